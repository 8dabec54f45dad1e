"""Reports that a run leaves while it trains: one at each evaluation, and none of them can end it."""

import re
from html import unescape

from vspdf.config import loading
from vspdf.report import run_page
from vspdf.train.trainer import train


def text(page):
    """Words of a page, tags dropped."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page.split("<body>")[1].split("<script>")[0])).split())


def test_train_draws_while_it_runs(tiny):
    """Each evaluation finds a page of that step; the last one that of the finished run."""
    seen = []

    def draw(folder):
        run_page.refresh(folder)
        seen.append(text((folder / "report.html").read_text()))

    settings = loading.load(tiny, ["phases=[{sparsity: 0.9, steps: 4}, {steps: 4}]", "train.eval_every=2"])
    train(settings, on_evaluation=draw)
    states = [re.search(r"step \d of 8|finished, 8 steps", words)[0] for words in seen]
    assert states == ["step 2 of 8", "step 4 of 8", "step 6 of 8", "finished, 8 steps"]


def test_a_report_that_cannot_be_drawn_ends_no_run(tiny, tmp_path, vspdf, caplog):
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    status, _, _ = vspdf("train", tiny, "phases=[{steps: 2}]")
    assert status == 0 and (tmp_path / "run" / "summary.json").exists()
    (warning,) = (record.message for record in caplog.records if "report.html" in record.message)
    assert "was not drawn" in warning and "\n" not in warning


def test_train_leaves_a_report(vspdf, tiny, tmp_path):
    assert vspdf("train", tiny, "phases=[{steps: 2}]")[0] == 0
    assert "finished, 2 steps" in text((tmp_path / "run" / "report.html").read_text())
