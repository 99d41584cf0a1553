"""Package dpa_ds. Install torch first: deepspeed needs it at build time (see README)."""

from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1] for line in Path("dpa_ds/__init__.py").read_text().splitlines() if line.startswith("__version__")
)

setup(
    name="dpa_ds",
    version=version,
    description="Federated dual-personalizing adapters (FedDPA) over one frozen LLM, at scale on DeepSpeed",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["dpa_ds", "dpa_ds.*"]),
    package_data={"dpa_ds": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17,<6",
        "peft>=0.21.2,<0.22",
        "mpi4py>=4.1,<5",
        "datasets>=5,<6",
        "tensorboard>=2.21,<3",
        "safetensors>=0.8,<1",
        "accelerate",  # the version that peft asks for; transformers loads to a device with it
        "tokenizers",  # the version that transformers asks for
        "huggingface_hub",  # likewise
        "numpy>=2",
        "pyarrow",  # the version that datasets asks for
        "jsonargparse[signatures]>=4.53,<4.54",
        "docstring_parser",  # the version that jsonargparse asks for
        "PyYAML>=6,<7",
        "psutil>=7",
        "tqdm>=4.67,<5",
        "matplotlib>=3.10,<4",
        "rouge-score>=0.1.2,<0.2",
        "sacrebleu>=2.6,<3",
        "gguf>=0.19,<0.20",
        "torchft>=0.2,<0.3",
    ],
    extras_require={
        "docs": ["mkdocs-material>=9.8,<10"],
        "quantization": ["bitsandbytes>=0.50,<0.51"],
        "demo": ["pip"],  # launch/prepare_demo.py downloads with it; environments made by uv lack it
        "test": [
            "bitsandbytes>=0.50,<0.51",
            "pytest>=9,<10",
            "pytest-rerunfailures>=16,<17",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6,<7",
            "mpich>=5,<6",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "import-linter>=2.16,<3",
            "interrogate>=1.7,<2",
            "types-PyYAML",
            "types-psutil",
            "types-tqdm",
        ],
    },
)
