"""Fixtures of the data tests: tiny files in the publishers' formats, and ways to spoil a copy of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def fixture_copy(tmp_path):
    """Copy a fixture folder to where a test may change it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy


@pytest.fixture
def events():
    """Build the table that filters and splits work on, from (user, item, timestamp) triples in file order."""

    def build(triples: list[tuple], **columns) -> pl.DataFrame:
        user, item, timestamp = zip(*triples, strict=True)
        table = pl.DataFrame({"raw_user": user, "raw_item": item, "timestamp": timestamp}, schema_overrides={"timestamp": pl.Int64})
        return table.with_columns(rating=pl.lit(None, dtype=pl.Float32)).with_columns(**columns)

    return build
