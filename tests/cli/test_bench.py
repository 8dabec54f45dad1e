"""What `vspdf bench linear` takes from a configuration: shapes, sparsities, precision."""

import pytest


def test_bench_takes_the_layers_of_a_configuration(tmp_path, monkeypatch, one_phase):
    from vspdf.cli.bench import _layers
    from vspdf.errors import UserError

    monkeypatch.chdir(tmp_path)
    text = one_phase.replace("steps: 2}]", "steps: 2, layers: {'h.0.mlp.*': 0.4}}, {steps: 2}]")
    (tmp_path / "mine.yaml").write_text(text.replace("CORPUS", "stdlib"))
    shapes, sparsities, dtype = _layers("mine.yaml", "", "")
    assert shapes == [(256, 16, 48), (256, 16, 16), (256, 16, 64), (256, 64, 16)]
    assert (sparsities, dtype) == ([0.4, 0.5], "fp32")
    assert _layers("mine.yaml", "0.9", "bf16")[1:] == ([0.9], "bf16")
    (tmp_path / "dense.yaml").write_text((text.split("phases")[0] + "phases: [{steps: 2}]").replace("CORPUS", "stdlib"))
    with pytest.raises(UserError, match="no phase of that configuration is sparse; say --sparsity"):
        _layers("dense.yaml", "", "")
