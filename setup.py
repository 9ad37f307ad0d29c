"Everything about the package is in settings.ini; this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
config = parser["DEFAULT"]
library = config["lib_path"]

setup(
    name=config["lib_name"],
    version=config["version"],
    description=config["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=config["author"],
    url=config["git_url"],
    license="Apache-2.0",
    keywords=config["keywords"],
    packages=find_packages(include=[library, f"{library}.*"]),
    package_data={library: ["apps/gallery/*.png", "apps/gallery/*.json", "data/*", "weights/*/*"]},
    python_requires=f">={config['min_python']}",
    install_requires=config["requirements"].split(),
    extras_require={name: config[f"{name}_requirements"].split() for name in ("lab", "eval", "simulation", "dev")},
    entry_points={
        "console_scripts": [config["console_scripts"]],
        "nbdev": [f"{library}={library}._modidx:d"],
    },
    zip_safe=False,
)
