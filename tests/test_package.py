"""The package as others meet it: its public names, its version, its registration with the Auto classes, and what is inside."""

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import pathlm

ROOT = Path(__file__).parents[1]
TEXT = {".py", ".md", ".toml", ".yml", ".cff", ".txt", ".svg", ""}
PLACES = ["/" + place + "/" for place in ("work", "opt", "root", "farm")]
HOSTS = ["pypi" + ".org", "npmjs" + ".", "python" + "hosted", "deb." + "debian"]


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_version_is_the_installed_one_and_the_one_to_cite():
    assert pathlm.__version__ == importlib.metadata.version("pathlm")
    assert f"version: {pathlm.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_tests_check_types_in_every_module_but_those_that_draw_tasks():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]["addopts"]
    *checked, checker = next(option for option in options if option.startswith("--jaxtyping-packages=")).partition("=")[2].split(",")
    assert checker == "beartype.beartype"
    modules = {module.name for module in pkgutil.walk_packages(pathlm.__path__, "pathlm.") if not module.ispkg}
    unchecked = {name for name in modules if not any(name == one or name.startswith(one + ".") for one in checked)}
    assert {name.rpartition(".")[0] for name in unchecked} == {"pathlm.text.synthetic", "pathlm"}
    assert {name for name in unchecked if name.count(".") == 1} == {"pathlm.__main__"}


@pytest.mark.parametrize("name", pathlm.__all__)
def test_a_public_name_is_documented_and_says_its_own_name(name):
    value = getattr(pathlm, name)
    assert value.__name__ == name
    assert value.__doc__.split("\n")[0].strip().endswith(".")
    assert name in dir(pathlm)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'presett'"):
        pathlm.presett  # noqa: B018


def test_import_pathlm_brings_no_torch():
    program = "import sys, pathlm, pathlm.config, pathlm.path, pathlm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    "order", ["import pathlm, transformers", "import transformers, pathlm", "from transformers import AutoConfig; import pathlm"]
)
def test_auto_classes_know_the_models_in_both_import_orders(order, tmp_path):
    pathlm.preset("plain-tiny").save_pretrained(tmp_path)
    program = (
        f"{order}\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
        f"config = AutoConfig.from_pretrained({str(tmp_path)!r})\n"
        "print(type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["BrianConfig", "BrianForCausalLM"], done.stderr


def test_every_module_imports_and_starts_with_a_sentence():
    for module in pkgutil.walk_packages(pathlm.__path__, "pathlm."):
        if module.name == "pathlm.__main__" or (module.name.endswith(".triton_kernels") and find_spec("triton") is None):
            continue
        found = importlib.import_module(module.name)
        assert found.__doc__, module.name
        assert re.match(r"[A-Z`].+", found.__doc__), module.name


def test_the_package_is_typed():
    assert (Path(pathlm.__file__).parent / "py.typed").is_file()


def test_nothing_names_a_machine_or_a_registry_host():
    found = []
    for file in tracked_files():
        if file.suffix not in TEXT:
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if any(word in line for word in [*PLACES, *HOSTS]):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_no_file_is_a_drawer_for_anything():
    names = {file.stem for file in tracked_files() if file.suffix == ".py"}
    assert not names & {"utils", "util", "helpers", "misc", "common", "manager"}


def test_both_original_projects_are_cited():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "arxiv.org/abs/2503.11299" in text
    assert "github.com/Miocio-nora/BRIAN" in text
