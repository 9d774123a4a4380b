"""A card claims what was measured for the head that it comes with, in metadata that the Hub reads."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from safespec_hf.heads.card import model_card
from safespec_hf.heads.hub import save_head


def test_the_metadata_of_a_card_parses(folder):
    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.license, data.base_model) == ("safespec-hf", None, "owner/target")
    assert data.tags == ["safety", "guardrail", "speculative-decoding", "safespec"]
    assert (data.datasets, data.metrics) == (["owner/corpus"], ["roc_auc"])
    assert [(r.dataset_name, r.metric_value) for r in data.eval_results] == [
        ("owner/benchmark", 0.93),
        ("held_out", 0.93),
    ]


@pytest.mark.parametrize(
    "said",
    [
        "arXiv:2606.19755",
        "Xu et al.",
        "independent implementation",
        "| architecture | LlamaForCausalLM |",
        "Hidden states 2 of 2",
        "0.875 or more",
        "480 whole benign answers from chat, with α = 0.02",
        "at most 2.00%",
        "| owner/corpus | cc-by-4.0 | training |",
        "| train.jsonl | cdcd",
        "| held_out | 50 | 60 | 0.930 | 0.900 | 0.700 | 0.020 |",
        "| chat | 9 | 0 | – | – | – | 0.000 |",
        "A guarantee, where one is stated, bounds false alarms",
    ],
)
def test_a_card_says(head, report, said):
    assert said in model_card(head, report=report).text


def test_a_guarantee_is_not_claimed_for_another_threshold(head, report):
    head.config.risk_threshold = 0.5
    text = model_card(head, report=report).text
    assert "It was calibrated at 0.875: that guarantee does not hold" in text
    assert "with probability at most" not in text


def test_a_guarantee_is_for_the_very_threshold_also_close_to_one(head, report):
    report["results"]["calibration"]["risk_threshold"] = 0.99999994
    head.config.risk_threshold = 0.99999988
    assert "It was calibrated at 0.99999994" in model_card(head, report=report).text


def test_a_guarantee_ends_where_calibration_cut_its_answers(head, report):
    report["results"]["calibration"]["max_response_tokens"] = 256
    text = model_card(head, report=report).text
    assert "480 benign answers from chat" in text
    assert "Answers were read up to 256 tokens." in text
    assert "flagged in its first 256 tokens with probability" in text


def test_a_card_without_a_report_claims_nothing(head):
    card = model_card(head)
    assert "no rate of false alarms is guaranteed" in card.text
    assert card.data.eval_results is None


def test_the_code_of_a_card_is_python(head):
    code = model_card(head, repo_id="owner/head").text.split("```python\n")[1].split("```")[0]
    assert compile(code, "card", "exec")
    assert '"owner/target"' in code


def test_results_are_written_for_sources_with_a_data_set_on_the_hub(folder):
    rows = yaml.safe_load((folder / ".eval_results/safespec.yaml").read_text())
    (entry,) = parse_eval_result_entries(rows)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("owner/benchmark", "default", 0.93)
    assert entry.date == "2026-01-02T03:04:05Z"


def test_a_saved_report_has_null_for_what_is_not_a_number(folder, report):
    assert "NaN" in json.dumps(report)
    saved = json.loads((folder / "report.json").read_text())
    assert saved["results"]["sources"]["chat"]["recall"] is None
    assert saved["results"]["sources"]["held_out"] == report["results"]["sources"]["held_out"]


def test_a_source_can_be_mapped_to_a_benchmark(head, report, tmp_path):
    benchmarks = {"held_out": {"dataset_id": "org/set", "task_id": "unsafe"}}
    save_head(head, tmp_path, {**report, "benchmarks": benchmarks})
    rows = yaml.safe_load((tmp_path / ".eval_results/safespec.yaml").read_text())
    assert {"id": "org/set", "task_id": "unsafe"} in [row["dataset"] for row in rows]
