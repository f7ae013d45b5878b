"""Records to report: pairing, tables with answers known in advance, figures, the `certjax report` command."""

import dataclasses
import json
import random
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from certjax.cli.report import report_command
from certjax.errors import InvalidArgumentError
from certjax.eval import plots, records, render
from certjax.eval.records import CertificateSummary, Record
from certjax.eval.summary import shortened, summarize

L, H = 3, 4
VERSIONS = {"certjax": "0.1.0", "jax": "0.11.2", "device": "cpu"}
CONFIG = {"dense": "aaaa", "naive": "bbbb", "budget": "cccc"}


def certificate(bound=0.1, *, rungs=(6, 3, 2, 1, 0), device=40.0, host=2.0, steps=None, **changes):
    steps = sum(rungs) // (L * H) if steps is None else steps
    at = np.arange(L * H).reshape(L, H) / (L * H)
    return CertificateSummary(**{
        "head_steps": steps * L * H, "rungs": list(rungs), "bound_mean": bound / 4, "bound_max": bound / 2,
        "before_mean": bound / 2, "before_max": 2 * bound, "before_layer_mean": bound / 3, "before_layer_max": bound,
        "before_paper_mean": 5 * bound, "before_paper_max": 9 * bound, "bytes_read": device, "bytes_paged_in": host,
        "bytes_dense": 100.0, "checks_failed": 0, "bound_by_head": (bound * (1 + at)).tolist(),
        "dense_by_head": (at / 10).tolist(), "promoted_by_head": (8 * at).tolist(), **changes,
    })  # fmt: skip


def record(benchmark, mode, sample, *, task=None, context=2048, seed=0, bound=0.1, rungs=(6, 3, 2, 1, 0), **fields):
    """A sample in a mode. Of "ppl": give `token_nll`; otherwise `score`."""
    task = task or {"ppl": "emma", "niah": "needles", "ruler": "vt"}[benchmark]
    n = len(fields.get("token_nll", range(3)))
    if mode != "dense":
        fields.setdefault("certificate", certificate(bound, rungs=rungs))
        if benchmark == "ppl":
            fields.setdefault("token_bound", [bound] * n)
    if benchmark != "ppl":
        fields = {"prediction": f"answer {fields['score']}", "references": ["7"], **fields}
    return Record(**{"benchmark": benchmark, "task": task, "context": context, "sample": sample, "seed": seed,
                     "mode": mode, "config": CONFIG.get(mode, "dddd"), "versions": VERSIONS,
                     "prompt_tokens": context // 2, "new_tokens": n, **fields})  # fmt: skip


def scored(benchmark, mode, scores, **fields):
    return [record(benchmark, mode, i, score=float(x), **fields) for i, x in enumerate(scores)]


def experiment(contexts=(2048, 4096), n=12):
    """All benchmarks in three modes: naive is harmed where its bound is large, budget never."""
    rng, made = np.random.default_rng(0), []
    for context in contexts:
        for i in range(n):
            nll, bound = rng.gamma(2, 1.5, 40), rng.gamma(2, 0.05, 40)
            jump = np.where(bound * rng.uniform(0.5, 1.5, 40) > 0.18, rng.normal(0.2, 0.3, 40), rng.normal(0, 0.01, 40))
            for mode, loss in (("dense", nll), ("naive", nll + jump), ("budget", nll + rng.normal(0, 0.001, 40))):
                of = {"token_nll": loss.tolist(), "context": context, "rungs": (12, 0, 0, 0, 0)}
                if mode != "dense":
                    of["token_bound"] = bound.tolist()
                if mode == "budget":
                    of["rungs"] = (6, 3, 2, 1, 0)
                made.append(record("ppl", mode, i, **of))
            for benchmark, task in (("niah", "needles"), ("ruler", "vt"), ("ruler", "cwe")):
                size, dense = rng.gamma(2, 0.05) * (1 + context / 4096), float(rng.choice([1, 1, 1, 0.5]))
                harmed = dense * 0.5 if size * rng.uniform(0.5, 1.5) > 0.15 else dense
                for mode, score in (("dense", dense), ("naive", harmed), ("budget", dense)):
                    of = {"task": task, "context": context, "score": score}
                    made.append(record(benchmark, mode, i, bound=size, rungs=(11, 0, 0, 1, 0), **of))
    return made


def summary(of, **options):
    return summarize(of, **{"resamples": 200, **options})


def rows(report, section, **where):
    return [r for r in report[section] if all(r[name] == value for name, value in where.items())]


def row(report, section, **where):
    (found,) = rows(report, section, **where)
    return found


@pytest.fixture(scope="module")
def report():
    return summary(experiment())


# -- tables with known answers ------------------------------------------------------------------------


def test_perplexity_pools_tokens_and_deltas_pool_windows():
    base, other = [[1.0, 3.0], [2.0]], [[1.5, 3.5], [2.1]]
    made = [record("ppl", mode, i, token_nll=nll) for mode, of in (("dense", base), ("naive", other))
            for i, nll in enumerate(of)]  # fmt: skip
    report = summary(made)
    dense, naive = (row(report, "ppl", mode=mode) for mode in ("dense", "naive"))
    assert dense["ppl"] == pytest.approx(np.exp(2.0)) and naive["ppl"] == pytest.approx(np.exp(7.1 / 3))
    assert (dense["samples"], dense["tokens"], "paired" in dense) == (2, 3, False)
    assert naive["delta_nll"]["value"] == pytest.approx((0.5 + 0.1) / 2)
    half = 12.706204736432095 * 0.4 / 2  # t of one degree of freedom, by the standard error of .5 and .1
    assert naive["delta_nll"]["low"] == pytest.approx(0.3 - half, rel=1e-9)
    assert naive["delta_ppl"]["value"] == pytest.approx((np.exp(2.5) - np.exp(2) + np.exp(2.1) - np.exp(2)) / 2)


def test_passes_failures_and_their_test():
    dense, naive = [1] * 8 + [0] * 2, [1] * 1 + [0] * 7 + [1] + [0.5]
    report = summary([*scored("niah", "dense", dense), *scored("niah", "naive", naive)])
    found = row(report, "niah", mode="naive")
    assert (found["passed"], found["samples"], found["paired"]) == (2, 10, 10)
    assert (found["critical"], found["reverse"]) == (7, 1)
    assert found["mcnemar_p"] == pytest.approx(0.0703125)  # statsmodels: mcnemar([[1, 7], [1, 1]], exact=True)
    assert found["critical_rate"]["value"] == 7 / 8 and found["critical_rate"]["n"] == 8
    assert found["delta_score"]["value"] == pytest.approx(-0.55)
    assert found["delta_pass_rate"]["value"] == pytest.approx(-0.6)
    assert found["same_text"] == pytest.approx(0.1)  # the builder's text says the score
    assert row(report, "niah", mode="dense")["pass_rate"]["value"] == 0.8


def test_modes_that_agree_have_no_delta_and_p_1():
    report = summary([*scored("ruler", "dense", [1, 0.5, 0]), *scored("ruler", "budget", [1, 0.5, 0])])
    found = row(report, "ruler", mode="budget")
    assert [found["delta_score"][of] for of in ("value", "low", "high")] == [0, 0, 0]
    assert (found["critical"], found["reverse"], found["mcnemar_p"], found["same_text"]) == (0, 0, 1, 1)


def test_score_over_tasks_is_the_mean_of_their_means():
    made = [*scored("ruler", "dense", [1, 1, 1, 1], task="vt"), *scored("ruler", "dense", [0, 0.5], task="cwe")]
    report = summary(made)
    assert row(report, "ruler", task="all")["score"]["value"] == pytest.approx((1 + 0.25) / 2)
    assert row(report, "ruler", task="cwe")["score"]["value"] == 0.25
    assert [r["task"] for r in report["ruler"]] == ["all", "cwe", "vt"]


def test_costs_weigh_samples_by_their_steps():
    short = certificate(0.1, rungs=(12, 0, 0, 0, 0), device=20.0, host=0.0)
    long = certificate(0.4, rungs=(0, 12, 0, 24, 0), device=60.0, host=8.0, checks_failed=2)
    made = scored("niah", "dense", [1, 1]) + [
        record("niah", "budget", i, score=1.0, certificate=of) for i, of in enumerate((short, long))
    ]
    report = summary(made)
    (found,) = report["cost"]
    assert found["rungs"] == pytest.approx([0.25, 0.25, 0, 0.5, 0]) and found["head_steps"] == 48
    assert found["device_over_dense"] == pytest.approx(0.5) and found["host_over_dense"] == pytest.approx(0.06)
    assert (found["checks_failed"], found["before_max"]) == (2, 0.8)
    assert found["before_mean"] == pytest.approx((0.05 + 3 * 0.2) / 4)
    assert report["heads"]["budget"]["niah"]["bound"][0][0] == pytest.approx((0.1 + 3 * 0.4) / 4)


def test_rows_are_in_the_order_of_contexts_and_modes(report):
    found = [(r["context"], r["mode"]) for r in report["niah"]]
    assert found == [(context, mode) for context in (2048, 4096) for mode in ("dense", "naive", "budget")]
    assert report["modes"] == {"dense": ["aaaa"], "naive": ["bbbb"], "budget": ["cccc"]}


def test_bounds_that_predict_harm_are_found_to(report):
    naive = row(report, "knows", mode="naive", benchmark="ruler", context="all", predictor="before_layer_max")
    harm = naive["harms"]["lower score"]
    assert 0.9 < harm["auc"]["value"] <= 1 and harm["auc"]["low"] > 0.8 and harm["roc"]["caught"][-1] == 1
    budget = row(report, "knows", mode="budget", benchmark="ruler", context="all", predictor="before_layer_max")
    assert "none of 48" in budget["harms"]["lower score"]["auc"]["reason"]
    assert {r["context"] for r in report["knows"]} == {2048, 4096, "all"}
    tokens = row(report, "knows", mode="naive", benchmark="ppl", context=2048)
    assert tokens["clusters"] == 12 and tokens["harms"]["> 0.2 nats"]["auc"]["low"] > 0.7


# -- what belongs together ----------------------------------------------------------------------------


def test_order_of_the_records_and_repeated_lines_play_no_part(report):
    made = experiment()
    random.Random(0).shuffle(made)
    again = summary(made + [dataclasses.replace(r, seconds=9.0) for r in made[:40]])
    assert json.dumps(again) == json.dumps(report)
    assert summary(made, seed=1) != report


def test_samples_without_partner_are_counted_and_left_out_of_the_deltas():
    dense, naive = scored("niah", "dense", [1, 1, 0, 1]), scored("niah", "naive", [0, 1, 0, 1, 1, 1])
    report = summary([*dense, *naive[1:], *scored("niah", "naive", [1], context=4096)])
    found = row(report, "niah", mode="naive", context=2048)
    assert (found["samples"], found["paired"], found["passed"], found["critical"]) == (5, 3, 4, 0)
    assert report["notes"] == [
        "unpaired: 2 samples that `dense` has not (niah at 2048 tokens, mode `naive`)",
        "unpaired: 1 of 4 samples of `dense` are missing (niah at 2048 tokens, mode `naive`)",
        "unpaired: 1 samples that `dense` has not (niah at 4096 tokens, mode `naive`)",
    ]
    assert "paired" not in row(report, "niah", mode="naive", context=4096)


def test_mode_that_was_not_run_on_everything_has_one_note_and_a_gap_in_what_it_was_run_on_another():
    made = [*scored("niah", "dense", [1]), *scored("niah", "budget", [1])]
    for context in (2048, 4096):
        for task in ("cwe", "fwe", "vt"):
            made += scored("ruler", "dense", [1, 1], task=task, context=context)
            made += scored("ruler", "budget", [1, 1], task=task, context=context)
    made += scored("ruler", "naive", [1, 1], task="vt", context=4096)
    made += scored("ruler", "naive", [0], task="fwe", context=4096)
    report = summary(made)
    assert report["notes"] == [
        "`naive` was run on: ruler 4,096 (fwe, vt)",
        "unpaired: 1 of 4 samples of `dense` are missing (ruler at 4096 tokens, mode `naive`)",
    ]
    assert [row(report, "ruler", mode=mode, context=4096, task="all")["tasks"] for mode in report["modes"]] == [3, 2, 3]
    page = render.markdown(report)
    assert "- `naive` was run on: ruler 4,096 (fwe, vt)\n" in page
    assert "| 4,096 | naive | 2 | 2 of 3 |" in page and "| 4,096 | dense | 3 | 6 of 6 |" in page
    (legend,) = plots.draw(report)["ruler_score.png"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "naive (2 of 3 tasks)", "budget"]


def test_mode_that_was_run_on_fewer_benchmarks_is_noted():
    report = summary([*scored("niah", "dense", [1]), *scored("ruler", "naive", [1]), *scored("ruler", "dense", [1])])
    assert report["notes"] == ["`naive` was run on: ruler 2,048"]


# -- labels -------------------------------------------------------------------------------------------


def labels(*modes):
    report = summary([r for i, m in enumerate(modes) for r in scored("niah", m, [1], config=str(i))], baseline=modes[0])
    return report["shared"], report["labels"]


def test_options_of_all_modes_but_dense_are_left_out_of_labels():
    assert labels("dense", "naive:codec=kivi_int2,tier2=device", "naive:tier2=device", "budget: tier2=device ,k=1") == (
        ["tier2=device"],
        {
            "dense": "dense",
            "naive:tier2=device": "naive",
            "naive:codec=kivi_int2,tier2=device": "naive:codec=kivi_int2",
            "budget: tier2=device ,k=1": "budget:k=1",
        },
    )
    assert labels("naive:a=1,b=2", "paper:b=2,a=1")[1] == {"naive:a=1,b=2": "naive", "paper:b=2,a=1": "paper"}


@pytest.mark.parametrize(
    "modes",
    [
        ("dense", "naive", "budget:tier2=device"),
        ("dense", "naive:tier2=device", "budget:tier2=host"),
        ("dense", "budget:tier2=device"),  # alone, it shares nothing
        ("dense", "naive:a=1,b=2", "naive:b=2,a=1"),  # would be one label
    ],
)
def test_labels_stay_where_nothing_is_shared_or_two_would_be_one(modes):
    assert labels(*modes) == ([], {mode: mode for mode in modes})


def test_page_and_figures_have_short_labels_and_the_data_has_both(tmp_path):
    made = [
        dataclasses.replace(r, mode=r.mode if r.mode == "dense" else f"{r.mode}:tier2=device")
        for r in experiment(n=4)
        if (r.benchmark, r.mode) != ("niah", "naive")
    ]
    records.write(tmp_path / "a.jsonl", made)
    result = run(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--bootstrap", 200)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.md").read_text()
    for text in (page, result.output):
        assert text.count("tier2=device") == 1 and "all modes but `dense`: tier2=device" in text
        assert "`naive` was run on: ppl 2,048; ppl 4,096; ruler 2,048; ruler 4,096\n" in text
    figures = {path.name for path in (tmp_path / "out").glob("heads_*.png")}
    assert figures == {"heads_naive.png", "heads_budget.png"}
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["labels"]["naive:tier2=device"] == "naive" and list(data["heads"]) == list(data["modes"])[1:]
    once = shortened(data)
    assert shortened(once) == once and {r["mode"] for r in once["cost"]} == {"naive", "budget"}


def test_page_lists_up_to_three_configurations_of_a_mode():
    def line(n):
        tasks = [f"task_{i}" for i in range(n)]
        made = [r for i, task in enumerate(tasks) for r in scored("ruler", "dense", [1], task=task, config=f"c{i}")]
        return next(x for x in render.markdown(summary(made)).splitlines() if x.startswith("- mode"))

    assert line(3) == "- mode `dense`: configuration c0, c1, c2"
    assert line(4) == "- mode `dense`: 4 configurations"


def test_texts_have_a_table_of_their_own():
    made = [record("ppl", mode, 0, task=task, token_nll=[1.0]) for mode in ("dense", "naive") for task in "ab"]
    parts = {part.title: part for part in render.sections(summary(made))}
    assert [r[1:3] for r in parts["Perplexity"].rows] == [("all", "dense"), ("all", "naive")]
    assert [r[1] for r in parts["Perplexity by text"].rows] == ["a", "a", "b", "b"]
    alone = {part.title: part for part in render.sections(summary([r for r in made if r.task == "a"]))}
    assert [r[1] for r in alone["Perplexity"].rows] == ["a", "a"] and "Perplexity by text" not in alone


def test_two_configurations_of_a_mode_are_refused_by_name():
    made = [*scored("niah", "dense", [1, 1]), *scored("niah", "dense", [1, 0], config="eeee")]
    with pytest.raises(InvalidArgumentError, match="two configurations, (aaaa and eeee|eeee and aaaa)"):
        summary(made)
    with pytest.raises(InvalidArgumentError, match="two configurations"):  # of different samples too
        summary([made[0], made[3]])


def test_two_outcomes_of_a_sample_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"two outcomes of sample 0 \(seed 0\)"):
        summary([*scored("niah", "dense", [1]), *scored("niah", "dense", [0])])


def test_other_prompts_other_models_and_a_missing_baseline_are_refused():
    dense, naive = scored("niah", "dense", [1])[0], scored("niah", "naive", [1])[0]
    with pytest.raises(InvalidArgumentError, match="another prompt in sample 0"):
        summary([dense, dataclasses.replace(naive, references=["8"])])
    small = certificate(bound_by_head=[[0.1]], dense_by_head=[[0.1]], promoted_by_head=[[0.1]])
    with pytest.raises(InvalidArgumentError, match=r"\(layers, heads\) \[\(1, 1\), \(3, 4\)\]"):
        summary([dense, naive, record("niah", "naive", 1, score=1.0, certificate=small)])
    with pytest.raises(InvalidArgumentError, match="no record is of the baseline 'dense'; the modes are naive"):
        summary([naive])
    with pytest.raises(InvalidArgumentError, match="there are no records"):
        summary([])
    with pytest.raises(InvalidArgumentError, match="unknown benchmark 'mmlu'"):
        summary([dataclasses.replace(dense, benchmark="mmlu")])


def test_another_baseline(report):
    turned = summary(experiment(), baseline="naive")
    a, b = row(report, "niah", context=4096, mode="naive"), row(turned, "niah", context=4096, mode="dense")
    assert (a["critical"], a["reverse"], a["mcnemar_p"]) == (b["reverse"], b["critical"], b["mcnemar_p"])
    assert list(turned["modes"]) == ["naive", "dense", "budget"]


def test_other_versions_are_noted():
    made = scored("niah", "dense", [1]) + scored("niah", "naive", [1], versions={**VERSIONS, "device": "gpu"})
    report = summary(made)
    assert len(report["versions"]) == 2 and "2 sets of versions" in report["notes"][0]


def test_what_is_not_finite_or_took_no_step_is_said_and_breaks_nothing():
    stuck = certificate(0.0, rungs=(0,) * 5, device=0.0, host=0.0, bytes_dense=0.0)
    made = [
        *scored("niah", "dense", [1, 1]), *scored("niah", "naive", [1], bound=float("inf")),
        record("niah", "naive", 1, score=1.0, certificate=stuck),
        record("ppl", "dense", 0, token_nll=[1.0, 2.0]), record("ppl", "naive", 0, token_nll=[1.0, float("nan")]),
    ]  # fmt: skip
    report = summary(made)
    text = json.dumps(report, allow_nan=False)
    assert "Infinity" not in text
    naive = row(report, "ppl", mode="naive")
    assert naive["ppl"] is None and naive["delta_nll"]["reason"] == "1 of 1 values are not finite"
    cost = row(report, "cost", benchmark="niah")
    assert cost["samples"] == 1 and cost["bound_max"] is None
    assert "inf" in render.markdown(report)
    assert all(figure.axes for figure in plots.draw(report).values())


# -- the page, the figures, the command ---------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Records in two files, and an audit."""
    directory = tmp_path_factory.mktemp("run")
    made = experiment()
    records.write(directory / "a.jsonl", made[:100])
    records.write(directory / "b.jsonl", made[100:])
    rng = np.random.default_rng(0)
    true = rng.lognormal(-5, 1, (L, H))
    total = {"head_steps": 96, "true_median": 0.001, "true_max": 0.04, "certified_median": 0.02, "certified_max": None}
    bound = (true * 8).tolist()
    bound[0][0] = None
    audit = {"policy": {"codec": "planes", "tolerance": 0.05}, "tokens": 4096, "violations": 0, "total": total,
             "heads": {"true_max": true.tolist(), "certified_max": bound}}  # fmt: skip
    (directory / "audit.json").write_text(json.dumps({"text": "emma", "device": "cpu", "report": audit}))
    return directory


def run(*arguments):
    return CliRunner().invoke(report_command, [str(a) for a in arguments], env={"COLUMNS": "160"})


def assert_message(result, *parts):
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
    assert all(part in line for part in parts), line


def test_command_writes_a_page_its_data_and_figures(files, tmp_path):
    out = tmp_path / "new" / "report"
    given = files / "a.jsonl", files / "b.jsonl", "--audit", files / "audit.json"
    result = run(*given, "--out", out, "--bootstrap", 200)
    assert result.exit_code == 0, result.output
    figures = sorted(path.name for path in out.glob("*.png"))
    assert figures == sorted([
        "ppl_delta.png", "niah_share_right.png", "ruler_score.png", "rungs.png", "bytes.png", "heads_naive.png",
        "heads_budget.png", "roc_ppl.png", "roc_niah.png", "roc_ruler.png", "bound_vs_error_0_planes.png",
    ])  # fmt: skip
    page = (out / "report.md").read_text(encoding="utf-8")
    assert all(page.count(f"]({name})") == 1 for name in figures)
    assert str(out) not in page and "None" not in page
    for table in page.split("\n\n"):
        if table.startswith("| "):
            assert len({line.count("|") for line in table.strip().splitlines()}) == 1, table
    for name in ("Perplexity", "RULER", "Does the certificate know?"):
        assert name in result.output
    written = json.loads((out / "report.json").read_text())
    assert written["resamples"] == 200 and written["records"] == 288


def test_command_gives_the_same_files_again_and_draws_nothing_if_asked(files, tmp_path):
    written = []
    for name in ("one", "two"):
        result = run(files / "b.jsonl", files / "a.jsonl", "--out", tmp_path / name, "--no-plots", "--bootstrap", 200)
        assert result.exit_code == 0, result.output
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["report.json", "report.md"]
        written.append([(tmp_path / name / of).read_bytes() for of in ("report.json", "report.md")])
    assert written[0] == written[1]


def test_command_prints_json(files, tmp_path):
    result = run(files / "a.jsonl", "--out", tmp_path, "--no-plots", "--bootstrap", 200, "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "report.json").read_text())


def test_command_explains_what_it_cannot_read(files, tmp_path):
    assert_message(run(files / "a.jsonl", "--out", tmp_path, "--baseline", "fp16"), "'fp16'", "--baseline")
    assert_message(run(files / "none.jsonl", "--out", tmp_path), "does not exist")
    assert_message(run(files / "a.jsonl", "--out", tmp_path, "--bootstrap", 5), "100")
    assert_message(run(files / "a.jsonl", "--out", files / "b.jsonl"), "b.jsonl", "is a file")
    assert_message(run(files / "a.jsonl", "--out", tmp_path, "--audit", files / "b.jsonl"), "--audit", "certjax audit")
    (tmp_path / "other.json").write_text('{"text": "emma", "report": {}}')
    assert_message(run(files / "a.jsonl", "--out", tmp_path, "--audit", tmp_path / "other.json"), "lacks 'heads'")
    (tmp_path / "empty.jsonl").touch()
    assert_message(run(tmp_path / "empty.jsonl", "--out", tmp_path), "no records")


@pytest.mark.parametrize(("module", "option"), [("scipy", "--no-plots"), ("matplotlib", "--plots")])
def test_command_names_the_extra_it_needs(files, tmp_path, monkeypatch, module, option):
    monkeypatch.setitem(sys.modules, module, None)
    result = run(files / "a.jsonl", "--out", tmp_path / "out", option)
    assert_message(result, module, 'pip install "certjax[eval]"')
    assert not (tmp_path / "out").exists()


def test_figures_of_many_modes_with_long_labels_and_of_one_cell():
    made = scored("niah", "dense", [1, 1, 0])
    for i in range(9):
        made += scored("niah", f"naive:codec=kivi_int4,group_size={i}", [i % 2, 1, 0], bound=0.1 * (i + 1))
    found = plots.draw(summary(made))
    assert sum(name.startswith("heads_") for name in found) == 9 and "ppl_delta.png" not in found
    assert len({plots.slug(name) for name in found}) == len(found)


def test_cells():
    assert render.estimate({"value": 0.5, "low": 0.25, "high": 1.0, "n": 9, "reason": None}) == "0.500 [0.250, 1.000]"
    assert render.estimate({"value": 0.5, "low": None, "high": None, "n": 1, "reason": "x"}) == "0.500 [–]"
    assert render.estimate({"value": None, "low": None, "high": None, "n": 0, "reason": "no values"}) == "no values"
    assert render.estimate(None) == "–" and render.number(None) == "inf"
    assert render.table(("a",), [("x|y",)]) == "| a |\n| --- |\n| x\\|y |\n"
