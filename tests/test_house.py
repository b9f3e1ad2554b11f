"""The house: an import only goes down, nothing unsafe is loaded, lines fit a screen."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for pattern in ("*.py", "support/*.py", "experiments/*.py")
                 for path in ROOT.glob(pattern))
FLOORS = {"support": 1, "unet": 2, "vae": 2, "dino": 2, "prompts": 2, "regional": 2,
          "dinodiff": 3, "evaluate": 3, "train": 4, "sample": 4, "mil": 5,
          "experiments": 5, "hubconf": 6, "prepare": 6}
PACKAGES = {"torch", "torchvision", "numpy", "scipy", "PIL"}
BEHIND_A_FILE_TYPE = {"h5py", "pydicom", "openslide", "torchxrayvision", "fcntl"}


def room(path):
    return path.stem if path.parent == ROOT else path.parent.name


def imports(tree):
    """(module, whether it stands at the file's top level) of each import."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            yield name, node in tree.body


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    """The method imports support and lower floors alone; other packages stand behind a flag."""
    import sys
    floor = FLOORS[room(path)]
    for name, is_top in imports(ast.parse(path.read_text())):
        package = name.split(".")[0]
        if package in FLOORS:
            same_folder = package == room(path) and package in ("support", "experiments")
            assert same_folder or FLOORS[package] < floor, f"{name} is not below"
        elif package not in PACKAGES and package not in sys.stdlib_module_names:
            assert package in BEHIND_A_FILE_TYPE and not is_top, name


def test_every_load_in_the_sources_is_a_safe_one():
    """Each torch.load says weights_only=True, each np.load allow_pickle=False; no eval, exec,
    pickle or shell; and nothing else reads arrays or weights."""
    safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False",
            "torch.hub.load_state_dict_from_url": "weights_only=True"}
    loads = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen",
                                  "pickle.load", "pickle.loads", "yaml.load"), (path, called)
            assert not called.startswith("subprocess."), (path, called)
            if called in safe:
                loads += 1
                given = [ast.unparse(k).replace(" ", "") for k in node.keywords]
                assert safe[called] in given or "**options" in given, (path, node.lineno)
    assert loads >= 7
