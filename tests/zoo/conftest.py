"""The checks of a network follow each other, so that one worker exports and analyses it once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest) -> Path:
    """Exported files; kept between sessions, since they depend on nothing but the zoo and torch."""
    assert request.config.cache is not None
    return request.config.cache.mkdir("zoo")


def network(item: pytest.Item) -> tuple[str, str]:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return (parameters["architecture"].name, parameters["exporter"]) if "exporter" in parameters else ("", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [place for place, item in enumerate(items) if item.path.parent == HERE]
    for place, item in zip(places, sorted((items[place] for place in places), key=network), strict=True):
        items[place] = item
