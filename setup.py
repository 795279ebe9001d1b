"""Adds the notebooks, their profiles and the application to a built package, as catlib/notebooks and catlib/examples; everything else stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithNotebooks(build_py):
    """Copies them from the checkout, where they stand at the top to be worked with; an editable installation finds them there."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        parts = ("notebooks/*.ipynb", "notebooks/profiles/*.yaml", "examples/*.py", "examples/*.html")
        for source in (path for part in parts for path in Path().glob(part)):
            target = Path(self.build_lib, "catlib", source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


setup(cmdclass={"build_py": WithNotebooks})
