"""The planner and its guard, from cameras to a checked trajectory.

ros2 launch vla_autoprune drive.launch.py bundle:=/path/to/bundle
ros2 launch vla_autoprune drive.launch.py bundle:=… deadline_ms:=100 namespace:=ego record:=/data/drive1
ros2 launch vla_autoprune drive.launch.py bundle:=… cam_front_topic:=/camera0/image_raw/compressed
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import OpaqueFunction

from ros_nodes.bringup import Bringup, common_arguments

CONFIG = Path(__file__).absolute().parents[1] / "config"


def start(context):
    bringup = Bringup(context, CONFIG)
    return [
        *bringup.environment(),
        *bringup.guard(),
        *bringup.planner(),
        *bringup.recorder(),
        *bringup.views(),
    ]


def generate_launch_description():
    return LaunchDescription(
        [*common_arguments(CONFIG, use_sim_time="false"), OpaqueFunction(function=start)]
    )
