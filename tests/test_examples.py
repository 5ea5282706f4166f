"""The worked examples run, and what they print is right."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from distributed_ranks import all_well

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in [n for n, m in sys.modules.items() if str(EXAMPLES) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


def test_every_example_is_tested():
    tested = {*MIXTURES, *CHAINS, "with_diffusers", "with_sedd", "with_ddp", "block_diffusion_transformer"}
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {*tested, "chain", "mixture"}


MIXTURES = {
    "with_k_diffusion": [],
    "with_edm": [],
    "with_score_sde": ["--steps", "150"],
    "with_flow_matching": [],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_are_of_the_mixture(name, example, capsys):
    found = example(name).main(MIXTURES[name])
    # 2000 samples of three equal parts: beyond five standard errors is a false alarm.
    assert found["share"] == pytest.approx(1 / 3, abs=0.055)
    assert found["spread"] == pytest.approx(0.2, rel=0.12)
    assert "spread" in capsys.readouterr().out


CHAINS = {"with_llada": [], "with_dream": [], "with_block_diffusion": []}


@pytest.mark.parametrize("name", CHAINS)
def test_texts_are_of_the_chain(name, example, capsys):
    found = example(name).main(CHAINS[name])
    # 11500 pairs: sampling alone gives 0.011, 0.020 at the worst of 100 seeds; four letters per step give 0.046.
    assert found["error"] < 0.025
    assert "pairs of letters" in capsys.readouterr().out


def fit(rank, options):
    sys.path.insert(0, str(EXAMPLES))
    import with_ddp

    return with_ddp.fit(with_ddp.parsed(options))


def test_two_ranks_fit_the_same_network_in_each_way():
    found = [all_well(2, fit, ["--steps", "150", *way]) for way in ([], ["--without-ddp"], ["--sharded"])]
    for (loss, norm), (_, of_other) in found:
        assert loss < 0.5 and norm == of_other  # it begins at 3.5
        assert loss == pytest.approx(found[0][0][0], rel=0.05)


def test_k_diffusion_beside_its_peer(example):
    from k_diffusion_peer import sampling

    sampling()
    found = example("with_k_diffusion").main(["--sampler", "sample_euler_ancestral", "--steps", "12"])
    assert found["difference"] < 1e-3


def test_diffusers(example, capsys):
    pytest.importorskip("diffusers")
    found = example("with_diffusers").main(["--steps", "5", "--scheduler", "EulerDiscreteScheduler"])
    assert found["difference"] < 1e-3 and found["ratio"] > 0
    assert "EulerDiscreteScheduler.step" in capsys.readouterr().out


def test_sedd(example, capsys):
    found = example("with_sedd").main([])
    # 11500 pairs: sampling alone gives 0.011, 0.020 at the worst of 100 seeds.
    assert found["error"] < 0.025
    assert "pairs of letters" in capsys.readouterr().out


def test_block_diffusion_transformer(example, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with several, small matrices wait for one another where tests run side by side
    try:
        found = example("block_diffusion_transformer").main(["--steps", "100", "--rows", "200"])
    finally:
        torch.set_num_threads(threads)
    # The letters' own entropy is 1.37 nats, the chain's rate 1.06; the last of 100 steps come to 1.11.
    assert found["first"] > 1.3 and found["loss"] < 1.2
    # Sampling alone gives 0.02; letters drawn without a look at their neighbours give 0.36. Here 0.05.
    assert found["error"] < 0.1 and found["by_hand"] < 0.1
    # By rounding alone two draws in a million differ.
    assert found["same"] > 0.99
    assert "block diffusion, blocks of 8" in capsys.readouterr().out
