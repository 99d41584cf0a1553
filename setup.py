"""Package dpa_ds. Install torch first: deepspeed needs it at build time (see README)."""

from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1] for line in Path("dpa_ds/__init__.py").read_text().splitlines() if line.startswith("__version__")
)

# A wheel holds these folders of the repository under dpa_ds/shipped, where dpa_ds/config/shipped.py finds them.
shipped = {
    "dpa_ds.shipped.launch": "launch",
    "dpa_ds.shipped.launch.recipes": "launch/recipes",
    "dpa_ds.shipped.launch.slurm": "launch/slurm",
    "dpa_ds.shipped.ds_configs": "ds_configs",
}

# Console command: module of dpa_ds/cli whose main() it calls.
commands = {
    "dpa-init": "init",
    "dpa-train": "train",
    "dpa-evaluate": "evaluate",
    "dpa-generate": "generate",
    "dpa-compare": "compare",
    "dpa-plan": "plan",
    "dpa-check": "preflight",
    "dpa-scaling-study": "scaling_study",
    "dpa-rendezvous": "rendezvous",
    "dpa-prepare-demo": "prepare_demo",
}

# Only some runs need these; dpa_ds/config/extras.py says which, where one is absent.
optional = {
    "elastic": ["torchft>=0.2,<0.3"],  # rank groups with launchers of their own
    "gguf": ["gguf>=0.19,<0.20"],  # a base model in a GGUF file
    "metrics": ["rouge-score>=0.1.2,<0.2", "sacrebleu>=2.6,<3"],  # scores of answers
    "figures": ["matplotlib>=3.10,<4"],  # pictures of reports
    "quantization": ["bitsandbytes>=0.50,<0.51"],  # a base in 8 or 4 bits
    "wandb": ["wandb>=0.31,<0.32"],
    "mlflow": ["mlflow-skinny>=3.17,<4"],
}

setup(
    name="dpa_ds",
    version=version,
    description="Federated dual-personalizing adapters (FedDPA) over one frozen LLM, at scale on DeepSpeed",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["federated learning", "LoRA", "large language models", "DeepSpeed"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2403.19211"},
    packages=[*find_packages(include=["dpa_ds", "dpa_ds.*"]), *shipped],
    package_dir=shipped,
    package_data={"": ["*.yaml", "*.sbatch", "*.json"], "dpa_ds": ["py.typed"]},
    entry_points={"console_scripts": [f"{name} = dpa_ds.cli.{module}:main" for name, module in commands.items()]},
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
    ],
    extras_require={
        **optional,
        "all": [requirement for requirements in optional.values() for requirement in requirements],
        "docs": ["mkdocs-material>=9.8,<10"],
        # launch/prepare_demo.py reads a GGUF file, and downloads with pip, which environments made by uv lack.
        "demo": ["pip", *optional["gguf"], *optional["metrics"], *optional["figures"]],
        "test": [
            *(requirement for requirements in optional.values() for requirement in requirements),
            "pip",
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
