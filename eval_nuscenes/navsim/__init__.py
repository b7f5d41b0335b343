"""NAVSIM's planning scores, PDMS (v1) and EPDMS (v2), without nuplan-devkit.

`scene` holds what a score needs to know, `simulation` turns a plan into driven states, `comfort` and
`scoring` give sub-scores, `aggregation` a result over frames. `unpickling`, `devkit_files` and `scene_files`
read and write files; `agent` runs inside an installation of NAVSIM's devkit; `nuscenes_scenes` builds scenes
from nuScenes data.
"""
