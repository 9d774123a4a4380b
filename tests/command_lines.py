"""Command lines that work, and for each of their options and arguments values that are wrong or look it."""

COUNTS = ["0", "-1", "x", "1.5", "", "nan", "1e3", "9" * 30, "--", "0x10", "1,2"]
SEEDS = ["-1", "x", "1.5", "", "nan", "2147483648", "9" * 30]
SHARES = ["0", "1", "-0.1", "2", "nan", "inf", "x", "", "1e400", "0,5"]
LAYERS = ["99", "-1", "x", "1,", ",", "", "1,1", "1-2", "1.5", "9" * 30, "²"]
CHOICES = ["foo-bar", "", "mean", "Mean-Answer", "float", "0", "float32,bfloat16", "SAFE"]
NO_FOLDERS = ["", " ", "a\0b", "/dev/null/x", "{data}", "{data}/x", "x" * 300]
NO_FILES = ["", "a\0b", "/dev/null/x", "{target}", "{data}/x", "x" * 300]
NO_DATA = ["", "a\0b", "nowhere.jsonl", "owner/nothing", "owner/nothing:train", "a/b/c", "{empty}", "./", "x" * 300]
NO_MODELS = [
    "",
    "a\0b",
    "./typo",
    "typo",
    "owner/nothing",
    "a/b/c",
    "bad id/x",
    "{data}",
    "{empty}",
    "{head}",
    "~/typo",
]
NO_HEADS = ["", "a\0b", "./typo", "typo", "owner/nothing", "a/b/c", "{data}", "{empty}", "{target}", "x" * 300]
NO_IDS = ["", "name", "bad id/x", "owner/", "/name", "a/b/c", "owner/na me", "owner/a..b", "owner/a--b", "owner/x.git"]
NO_BRANCHES = ["", "a b", "a..b", "/a", "a/", "-a", "a.lock", "a~b", "a\0b"]
NO_LICENSES = ["", "Apache 2.0", "MIT", "-", "a\nb"]

NO_POLICIES = ["", " ", "nowhere.json", "{empty}", "{blank}", "a\0b", "~nobody-has-this-home/p.json", "x" * 300]
NO_POLICIES += [" {", " []", "[]", "null", ' {"a": 1}', ' {"a": ' * 5_000]
NO_POLICIES += [' {"num_candidates": 0}', ' {"num_candidates": "4"}', ' {"policy": "observe"}', ' {"seed": -1}']
NO_POLICIES += [' {"risk_threshold": NaN}', ' {"risk_threshold": Infinity}']

COMMANDS = {
    "collect": ["{prompts}", "--out", "{new}/a.jsonl", "--label", "safe", "--target", "{target}"],
    "features": ["{data}", "--target", "{target}", "--cache", "{new}"],
    "train": ["{data}", "--out", "{new}", "--target", "{target}", "--cache", "{new}"],
    "calibrate": ["{head}", "--benign", "{benign}", "--target", "{target}", "--cache", "{new}"],
    "report": ["{head}", "{data}", "--out", "{new}", "--target", "{target}", "--cache", "{new}"],
    "distill-draft": ["{prompts}", "--out", "{new}", "--target", "{target}", "--cache", "{new}"],
    "make-head": ["{target}", "--prompts", "{many}", "--labelled", "{data}", "--out", "{new}"],
    "evaluate": ["--attacks", "{prompts}", "--out", "{new}/e.jsonl", "--target", "{target}", "--head", "{head}"],
    "report-evaluation": ["{answers}", "--out", "{new}"],
    "make-judge": ["--measured-on", "{data}", "--out", "{new}", "--embedder", "{target}"],
    "export": ["{new}", "--target", "{target}", "--head", "{head}"],
    "push": ["{head}", "owner/name", "--license", "mit", "--dry-run"],
    "show": ["{head}"],
    "serve": ["{target}", "--head", "{head}"],
}
NO_TEMPLATES = ["", "a\0b", "nowhere.jinja", "{empty}", "{blank}", "x" * 300, "plain"]  # the target has another one
MODEL = {"--target": NO_MODELS, "--dtype": CHOICES, "--chat-template": NO_TEMPLATES}
CACHED = {**MODEL, "--cache": NO_FOLDERS, "--max-response-tokens": COUNTS}
OPTIONS = {
    "collect": {
        **MODEL,
        "--out": NO_FILES,
        "--label": CHOICES,
        "--labeler": ["{target}", "x"],  # beside a label
        "--max-new-tokens": COUNTS,
        "--batch-size": COUNTS,
        "--temperature": ["-1", "nan", "inf", "x", "", "101"],
        "--limit": COUNTS,
    },
    "features": {**CACHED, "--layers": LAYERS, "--benign": NO_DATA},
    "train": {
        **CACHED,
        "--out": NO_FOLDERS,
        "--layers": LAYERS,
        "--read-layers": LAYERS,
        "--reading": CHOICES,
        "--validation": [*NO_DATA, "{data}", "{benign}"],
        "--width": ["-1", "x", "1.5", "", "99999999"],
        "--num-members": COUNTS,
        "--seed": SEEDS,
    },
    "calibrate": {
        **CACHED,
        "--alpha": [*SHARES, "0.001"],
        "--validation": [*NO_DATA, "{benign}"],
        "--benign": NO_DATA,
    },
    "report": {**CACHED, "--out": NO_FOLDERS, "--benign": NO_DATA},
    "distill-draft": {
        **MODEL,
        "--cache": NO_FOLDERS,
        "--out": NO_FOLDERS,
        "--layers": LAYERS,
        "--start": NO_HEADS,
        "--depths": [*COUNTS, "65"],
        "--epochs": COUNTS,
        "--step-tokens": COUNTS,
        "--draft-vocab-size": COUNTS,
        "--learning-rate": ["0", "-1", "nan", "inf", "x", "", "2"],
        "--held-out-fraction": SHARES,
        "--max-minutes": ["-1", "nan", "inf", "x", ""],
    },
    "make-head": {
        "--dtype": CHOICES,
        "--chat-template": NO_TEMPLATES,
        "--prompts": [*NO_DATA, "{prompts}", "{data}"],  # too few, and labelled unsafe
        "--labelled": [*NO_DATA, "{benign}"],
        "--validation": [*NO_DATA, "{data}", "{benign}"],
        "--from-hub": ["", "x", "BeaverTails", "or-bench,aegis"],
        "--hub-rows": COUNTS,
        "--out": NO_FOLDERS,
        "--work": NO_FOLDERS,
        "--alpha": [*SHARES, "0.001"],
        "--layers": LAYERS,
        "--max-new-tokens": COUNTS,
        "--max-response-tokens": COUNTS,
        "--batch-size": COUNTS,
        "--seed": SEEDS,
    },
    "evaluate": {
        **MODEL,
        "--attacks": NO_DATA,
        "--benign": NO_DATA,
        "--tasks": [*NO_DATA, "{prompts}"],  # already there
        "--multi-turn": NO_DATA,
        "--out": NO_FILES,
        "--head": NO_HEADS,
        "--draft": [name for name in NO_HEADS if name != "{target}"] + ["{head}"],
        "--method": ["", "x", "safespec:x=1", "safespec:num_candidates=0", "target:x=1", "guard_finished", "refuse:x"],
        "--attacker": ["", "x", "Cipher"],
        "--guard": ["", "x", "a\0b"],
        "--max-new-tokens": COUNTS,
        "--batch-size": COUNTS,
        "--limit": COUNTS,
        "--seed": SEEDS,
    },
    "export": {
        "--target": NO_MODELS,
        "--dtype": CHOICES,
        "--head": NO_HEADS,
        "--draft": [name for name in NO_HEADS if name != "{target}"] + ["{head}"],
        "--license": NO_LICENSES,
        "--operating-point": ["x", "strict"],
    },
    "report-evaluation": {"--out": NO_FOLDERS, "--judge": ["", "x", "a\0b", "{target}"]},
    "make-judge": {
        "--measured-on": [*NO_DATA, "{benign}", "{prompts}"],
        "--labelled": [*NO_DATA, "{data}", "{prompts}"],
        "--embedder": [*NO_FOLDERS, "{empty}"],
        "--out": NO_FOLDERS,
        "--work": NO_FOLDERS,
        "--folds": [*COUNTS, "1", "101", "13"],
    },
    "push": {"--revision": NO_BRANCHES, "--license": NO_LICENSES, "--report": [*NO_FOLDERS, "{empty}", "{target}"]},
    "show": {},
    "serve": {"--head": NO_HEADS, "--policy": NO_POLICIES, "--reports": CHOICES},
}
ARGUMENTS = {
    "collect": [NO_DATA],
    "features": [NO_DATA],
    "train": [[*NO_DATA, "{benign}"]],
    "calibrate": [NO_HEADS],
    "report": [NO_HEADS, NO_DATA],
    "distill-draft": [NO_DATA],
    "make-head": [NO_MODELS],
    "evaluate": [],
    "report-evaluation": [[*NO_DATA, "{data}"]],
    "export": [[*NO_FOLDERS, "{target}"]],
    "push": [NO_HEADS, NO_IDS],
    "show": [NO_HEADS],
    "serve": [NO_MODELS],
}
