"""Run files of sweeps and diagnostics -> tables, figures and one page; `python -m decdec_eval.report`."""
