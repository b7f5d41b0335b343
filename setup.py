"""One description for pip and for colcon's ament_python, which reads setup.py alone."""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "vla_autoprune"
HERE = Path(__file__).resolve().parent  # colcon --symlink-install runs this file through a link
TOP_LEVEL = (NAME, "engines", "eval_nuscenes", "ros_nodes")

setup(
    name=NAME,
    version="0.1.0",
    description="AutoPrune's adaptive visual-token pruning for driving VLAs, in static-shaped stages",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The vla_autoprune authors",
    maintainer="The vla_autoprune authors",
    maintainer_email="vla-autoprune@example.org",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[f"{top}{rest}" for top in TOP_LEVEL for rest in ("", ".*")]),
    package_data={
        NAME: ["py.typed", "models/shipped/*", "profiling/*.json"],
        "engines": ["parser_operators.json"],
        "eval_nuscenes.navsim": ["devkit_config/agent/*.yaml"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        # Where `ros2 run` looks; pip puts entry points elsewhere.
        (f"lib/{NAME}", sorted(str(path.relative_to(HERE)) for path in (HERE / "scripts").iterdir())),
        *(
            (f"share/{NAME}/{folder}", files)
            for folder in ("launch", "config")
            if (files := sorted(str(path.relative_to(HERE)) for path in (HERE / folder).glob("*.*")))
        ),
    ],
    entry_points={"console_scripts": ["vla-autoprune = vla_autoprune.cli:main"]},
    zip_safe=False,
    install_requires=[
        "numpy>=1.23",
        "opencv-python-headless>=4.8",
        "pillow>=10",  # the filters that images were resized with in training, loaded where a bundle asks
        "onnxruntime>=1.20",
        "tokenizers>=0.20",
        "pydantic>=2.5",
        "typer>=0.29",
        "rich>=13",
    ],
    extras_require={
        "export": [
            "torch>=2.9",
            "transformers>=5.17",
            "safetensors>=0.5",
            "onnx>=1.19",
            "onnxscript>=0.5.6",
            "matplotlib>=3.6",
        ],
        "eval": [
            "nuscenes-devkit>=1.2",
            "matplotlib>=3.6",
            "shapely>=2.0.3",
            "scipy>=1.10",
            "PyYAML>=6",
            "jinja2>=3.1",
        ],
        "ray": ["ray>=2.40"],
        "profile": ["nvidia-ml-py>=12.535", "nvtx>=0.2.10"],  # power of NVIDIA cards; ranges for Nsight
        "viz": ["rerun-sdk>=0.22", "foxglove-sdk>=0.14"],
        "record": ["rosbags>=0.11"],
        "ros-test": [
            "psutil>=5.9",
            *(
                f"ros-kilted-{name}; sys_platform == 'linux' and platform_machine == 'x86_64'"
                for name in (
                    "rclpy",
                    "rmw-fastrtps-cpp",
                    *(
                        f"{kind}-msgs"
                        for kind in (
                            "diagnostic",
                            "geometry",
                            "lifecycle",
                            "nav",
                            "rosgraph",
                            "sensor",
                            "std",
                            "visualization",
                        )
                    ),
                )
            ),
        ],
        "tensorrt": ["cuda-python>=12.6"],  # TensorRT itself comes with JetPack, or from pip install tensorrt
        "dev": [
            "ruff>=0.12",
            "mypy>=1.15",
            "import-linter>=2.3",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "mcap>=1.2",
            "mcap-protobuf-support>=0.5",
            "hypothesis>=6.100",
        ],
    },
)
