"""A nuScenes-format data set played through planner and guard, scored while it plays.

ros2 launch vla_autoprune replay.launch.py bundle:=out/demo/bundle data_root:=out/demo/world
ros2 launch vla_autoprune replay.launch.py bundle:=… data_root:=… lockstep_timeout_s:=5 out:=score.json
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import EmitEvent, OpaqueFunction
from launch.events import Shutdown

from ros_nodes.bringup import Bringup, argument, common_arguments, goes_down_with, number

CONFIG = Path(__file__).absolute().parents[1] / "config"

PLAYER = {
    "version": ("v1.0-synth", "of the data set's tables"),
    "split": ("val", "which scenes"),
    "scenes": ("", "names, separated by commas; all of the split unless given"),
    "rate": ("1.0", "times real time"),
    "loop": ("false", "begin again at the end", ("true", "false")),
    "command_source": ("route", "future leaks the label", ("route", "future")),
    "lockstep_timeout_s": ("0.0", "above 0: wait this long for the plan of each keyframe"),
}


def start(context):
    bringup = Bringup(context, CONFIG)
    values = bringup.values
    player = bringup.node(
        "ros_nodes.player_node",
        "nuscenes_player",
        {
            "data_root": str(Path(values["data_root"]).absolute()),
            "use_sim_time": False,
            "subscribers": 2 if values["record"] else 1,  # the planner, and the recorder
            "truth_subscribers": 2 if values["record"] else 1,  # the monitor, and the recorder
            **{name: values[name] for name in ("version", "split", "scenes", "command_source")},
            **{name: number(name, values[name]) for name in ("rate", "lockstep_timeout_s")},
            "loop": values["loop"] == "true",
        },
    )
    monitor = bringup.node(
        "ros_nodes.monitor_node",
        "open_loop_monitor",
        {"out": values["out"] and str(Path(values["out"]).absolute()), "path_topic": values["scored_topic"]},
    )
    played = EmitEvent(event=Shutdown(reason="the data set has been played and scored"))
    return [
        *bringup.environment(),
        *bringup.guard(),
        *bringup.planner(acceleration_source="topic"),
        *bringup.recorder(),
        *bringup.views(),
        goes_down_with(monitor, "open_loop_monitor", may_end=[played]),
        goes_down_with(player, "nuscenes_player", may_end=[]),
        monitor,
        player,
    ]


def generate_launch_description():
    return LaunchDescription(
        [
            *common_arguments(CONFIG, use_sim_time="true"),
            argument("data_root", None, "directory of the data set"),
            *(argument(name, *rest) for name, rest in PLAYER.items()),
            argument("scored_topic", "planner/path", "planner/path, or trajectory/path behind the guard"),
            argument("out", "", "JSON file for the scores"),
            OpaqueFunction(function=start),
        ]
    )
