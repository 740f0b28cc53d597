import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from llmrec.config import Config
from llmrec.evaluation import plots, protocol
from llmrec.evaluation.report import Candidate, Context, Cost, Sample, write_report

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</td></table></html>",
    "{{ 7 * 7 }}{% raw %}",
    "visit http://evil.example/x?a=1&b=2 or HTTPS://evil.example",
    "‮gnihton\x00\x1b[31m\ud800",
    "javascript:alert(1)' onmouseover='alert(1)",
]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects text, tags and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def context(table, tmp_path):
    plots.weight_curve(tmp_path / "weight.png", [(0.0, 0.05), (0.5, 0.06), (1.0, 0.04)], 0.5)
    known = {"data_fingerprint": "ab", "ambiguous_targets": 7, "users_evaluated": 300, "candidate_set": "top 20", "history_masked": True}
    return Context(
        title="ml-100k: 2mamba4rec + llamarec",
        verdict="Not shown: nothing was.",
        table=table,
        plots={"Fusion weight": tmp_path / "weight.png"},
        samples=[Sample("196", ["Toy Story"], [Candidate("Heat", 2, 1, 1, 0.61234, True), Candidate("Alien", 1, 2, 2, 0.3, False)])],
        pairs={"rating": {"pairs": 1234, "skipped": None}},
        costs=[Cost("sft", 200.0, 3456.7)],
        protocol=asdict(protocol.card(Config(), **known)),
        data={"users": 943, "density": 0.063, "sources": ["https://files.grouplens.org/x.zip"]},
        weights="HuggingFaceTB/SmolLM2-135M-Instruct",
        recipe=asdict(Config()),
    )


@pytest.fixture
def html(context, tmp_path):
    def written(**changes):
        write_report(tmp_path / "report.html", replace(context, **changes))
        return (tmp_path / "report.html").read_text("utf-8")

    return written


def test_the_page_is_whole_and_says_everything(html, table):
    page = Page(html())
    assert page.text.index("Not shown: nothing was.") < page.text.index("Results") < page.text.index("What was run")
    for wanted in (
        f"{table['overall']['fused']['ndcg@10']:.4f}",
        f"{table['bound']['hr@20']:.4f}",
        "against the target",
        "1,234",
        "3 min 20 s",
        "3,457",
        "SmolLM2-135M-Instruct",
        "training.learning_rate",
        "0.6123",
    ):
        assert wanted in page.text


def test_the_target_is_marked_and_candidates_stand_in_the_retrievers_order(html):
    text = html()
    assert re.findall(r'<tr class="target"><td class="text"><bdi>(.*?)</bdi>', text) == ["Heat"]
    assert text.index(">Alien<") < text.index(">Heat<")


def test_nothing_outside_is_asked_for(html):
    text = html()
    page = Page(text)
    assert not re.search(r"https?://|<script|<link|<iframe|url\(|@import", text, re.IGNORECASE)
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name in ("src", "href"))
    assert "https://files.grouplens.org/x.zip" in page.text  # readable all the same


@pytest.mark.parametrize("title", HOSTILE)
def test_hostile_titles_stay_text(html, context, title):
    sample = Sample(title, [title], [replace(context.samples[0].candidates[0], title=title)])
    text = html(
        samples=[sample], title=title, weights=title, pairs={title: title}, verdict=title, plots={title: context.plots["Fusion weight"]}
    )
    tame = html(samples=[replace(sample, user="u", history=["t"])])
    page = Page(text)
    assert not re.search(r"https?://|<script", text, re.IGNORECASE)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert set(page.tags) == set(Page(tame).tags)
    assert not re.search("[\u202e\x00\x1b]", text)
    visible = "".join(c if c.isprintable() else " " for c in title)
    assert page.text.count(visible) >= 6


def test_a_failed_report_leaves_the_old_one(html, context, tmp_path):
    before = html()
    with pytest.raises(FileNotFoundError):
        html(plots={"gone": tmp_path / "gone.png"})
    assert (tmp_path / "report.html").read_text("utf-8") == before
