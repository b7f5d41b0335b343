"""Hydra's search path for NAVSIM's scripts: `pkg://eval_nuscenes.navsim.devkit_config`."""
