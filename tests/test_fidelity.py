"""evaluate.py and experiments fidelity: two folders; the judges."""
import json
import math

import pytest
import torch

import evaluate
from experiments import __main__ as experiments
from experiments.fidelity import feature_extractor
from support.command import UserError
from support.phantoms import chest_phantoms
from support.pictures import save_png


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Forty chests, and twenty of them darker."""
    folder = tmp_path_factory.mktemp("sets")
    chests = chest_phantoms(40, size=64, seed=0)[0].expand(-1, 3, -1, -1)
    for i, image in enumerate(chests):
        save_png(folder / "real" / f"{i}.png", image)
        if i < 20:
            save_png(folder / "dark" / f"{i}.png", image - 0.4)
    return folder


def fidelity(folders, name, *flags):
    """The JSON that the experiment writes."""
    out = folders / f"{name}.json"
    experiments.main(["fidelity", str(folders / "real"), str(folders / name), "--device", "cpu",
                      "--rounds", "3", "--out", str(out), *flags])
    return json.loads(out.read_text())


def test_two_folders(folders, capsys):
    """evaluate.py prints the experiment's distances: floor, equal, all."""
    evaluate.main([str(folders / "real"), str(folders / "dark"), "--device", "cpu"])
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert set(evaluate.METRICS) < set(rows)

    result = fidelity(folders, "dark")
    assert result["real"] == 40 and result["synthetic"] == 20
    frechet = result["frechet"]
    # The experiment draws the images of equal counts in another order.
    assert list(map(float, rows["frechet"])) == pytest.approx(
        [frechet[name] for name in ("floor", "equal", "all")], rel=0.3)
    assert float(rows["frechet"][2]) == pytest.approx(frechet["all"], rel=1e-3)
    assert frechet["equal"] > 2 * frechet["floor"]
    assert frechet["interval"][0] < frechet["interval"][1]
    assert 0 <= result["recall"]["interval"][0] <= result["recall"]["interval"][1] <= 1
    assert result["brightness difference"] == pytest.approx(-0.18, abs=0.05)
    assert result["sharpness ratio"] == pytest.approx(1, abs=0.2)


def test_sets_that_do_not_compare(folders, tmp_path):
    """Images of several sizes."""
    for side in (64, 96):
        save_png(tmp_path / "two" / f"{side}.png", torch.rand(3, side, side))
    with pytest.raises(UserError, match=r"\[64, 96\] pixels a side.*--size 64"):
        evaluate.main([str(folders / "real"), str(tmp_path / "two"), "--device", "cpu"])


def test_a_foreign_judge_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot load .*FIDInception is needed.*--weights"):
        feature_extractor("inception", str(tmp_path / "w.pth"), "cpu")


def test_radiomics_with_a_ladder(folders):
    """Distances by radiomic features, and known damage beside them; FRD is log d."""
    result = fidelity(folders, "dark", "--features", "radiomics", "--ladder")
    rungs = result["ladder"]
    assert list(rungs) == ["real", "JPEG 90", "blur 3 x 3", "synthetic"]
    assert rungs["real"]["frechet"] == pytest.approx(result["frechet"]["floor"])
    assert rungs["synthetic"]["frechet"] == pytest.approx(result["frechet"]["equal"])
    assert rungs["synthetic"]["floors"] > 2
    for figures in rungs.values():
        assert figures["FRD"] == pytest.approx(math.log(figures["frechet"]) / 2)
