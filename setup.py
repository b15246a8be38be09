"""What pyproject.toml cannot say: the wheel also holds the model repository and the kernels.

In a checkout they lie beside the package, where an editable installation finds them.
"""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py

BESIDE = {"model_repository": "stepvideo_serve/model_repository", "kernels/stepvideo_kernels": "stepvideo_kernels"}


class BuildWithWhatLiesBeside(build_py):
    """Copies each folder of BESIDE to its place in the wheel."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in BESIDE.items():
                hidden = ignore_patterns("__pycache__")
                copytree(source, Path(self.build_lib, target), ignore=hidden, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithWhatLiesBeside})
