"""An exported model in code that does not know us: as the target alone while the head is silent, and never unguarded.

Here on a tiny model, in this process. `make test-surfaces` has the rest, on the default target: lm-evaluation-harness,
`transformers serve` and its clients.
"""

import importlib.util
import os

import pytest
import surfaces
import tiny
from served import stop_servers
from surfaces import REFUSED, SURFACES
from tiny import attach, build_draft_head, build_head, build_model

from safespec_hf import export_guarded, load_default

IS_WHOLE = bool(os.environ.get("SAFESPEC_SURFACES"))
REFUSAL = "no thanks"
# those that need more run in another process
LOCAL = [name for name, surface in SURFACES.items() if set(surface.needs) <= {"datasets"}]
LOCALLY_REFUSED = [name for name, surface in REFUSED.items() if not surface.needs]
REAL = list(SURFACES) if IS_WHOLE else ["the same, messages"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Two exports of a tiny model: one whose head is silent, and one that flags all."""
    folder, model, tokenizer = tmp_path_factory.mktemp("tiny"), build_model(), tiny.build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}pause"
    guarded = attach(model, tokenizer, build_head(model, tokenizer=tokenizer))
    silent = export_guarded(guarded, folder / "guarded", draft=build_draft_head(model))
    return silent, surfaces.close_the_garden(silent, folder / "closed", REFUSAL)


@pytest.fixture(scope="module")
def real_exports(tmp_path_factory):
    """The same of the default target."""
    folder, (model, _, draft) = tmp_path_factory.mktemp("real"), load_default()
    silent = export_guarded(model, folder / "guarded", draft=draft)
    yield silent, surfaces.close_the_garden(silent, folder / "closed", REFUSAL)
    stop_servers()


@pytest.mark.parametrize("name", LOCAL)
def test_a_silent_head_leaves_the_targets_own_answers(exports, name):
    surface = SURFACES[name]
    assert surface.run(exports[0]) == surfaces.expected(exports[0], surface.is_chat)


@pytest.mark.parametrize("name", LOCAL)
def test_what_is_flagged_is_neither_returned_nor_streamed(exports, name):
    assert SURFACES[name].run(exports[1]) == [REFUSAL] * len(surfaces.PROMPTS)


@pytest.mark.parametrize("name", LOCALLY_REFUSED)
def test_what_can_not_be_guarded_is_refused(exports, name):
    assert surfaces.refused(lambda: REFUSED[name].run(exports[0]))


@pytest.mark.real_model
@pytest.mark.parametrize("name", REAL)
def test_the_default_target_is_guarded_in_others_code(real_exports, name):
    surface = SURFACES[name]
    skip_unless_installed(surface)
    assert surface.run(real_exports[0]) == surfaces.expected(real_exports[0], surface.is_chat)
    assert surface.run(real_exports[1]) == [REFUSAL] * len(surfaces.PROMPTS)


@pytest.mark.real_model
@pytest.mark.skipif(not IS_WHOLE, reason="starts servers: see `make test-surfaces`")
@pytest.mark.parametrize("name", [name for name in REFUSED if name not in LOCALLY_REFUSED])
def test_servers_refuse_what_can_not_be_guarded(real_exports, name):
    skip_unless_installed(REFUSED[name])
    assert surfaces.refused(lambda: REFUSED[name].run(real_exports[0]))


def skip_unless_installed(surface):
    for package in surface.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: `make test-surfaces` installs it")
