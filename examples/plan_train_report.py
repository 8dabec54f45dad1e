"""Plan a run for a wish, train it beside a dense run of the same cost, and report both side by side.

    python examples/plan_train_report.py FOLDER [key=value ...]

FOLDER receives the configurations, the runs and comparison.html; it takes two minutes on two cores. Settings go to both
runs. The same on the command line:

    vspdf plan --model quickstart --save 0.6 --write variable.yaml
    vspdf train variable.yaml && vspdf train dense.yaml
    vspdf report runs/variable runs/dense
"""

import sys
from pathlib import Path

from vspdf.config import loading
from vspdf.plan.planner import plan
from vspdf.plan.write import write
from vspdf.report import run_page
from vspdf.train.trainer import train

folder, overrides = Path(sys.argv[1]), sys.argv[2:]
folder.mkdir(parents=True, exist_ok=True)
start = folder / "start.yaml"  # the quick start's model, smaller
start.write_text(loading.to_yaml(loading.load("quickstart", ["model.n_layer=2", "model.d_model=256", *overrides])))

variable = plan(start, save=0.6)  # 60 % fewer FLOPs than the dense run of as many steps
affordable = round(variable.dense.steps * (1 - variable.flops_saved_fraction))
dense = plan(start, phases=[(0.0, affordable)])  # as many dense steps as that buys
runs = {}
for name, found in {"variable": variable, "dense": dense}.items():
    print(
        f"{name}: "
        + ", ".join(f"{p.steps} steps at {p.sparsity:g}" for p in found.phases)
        + f", {found.flops:.3g} FLOPs"
    )
    write(found, folder / f"{name}.yaml")
    runs[name] = folder / name
    summary = train(loading.load(folder / f"{name}.yaml", [f"run_dir={runs[name]}"]), on_evaluation=run_page.refresh)
    print(f"{name}: validation loss {summary['val_loss']:.4f}, {summary['seconds']:.0f} s")
print(f"wrote {run_page.write(list(runs.values()), folder / 'comparison.html')}")
