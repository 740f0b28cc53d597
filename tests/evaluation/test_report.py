import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from llmrec.config import Config
from llmrec.evaluation import plots, protocol
from llmrec.evaluation.drawing import Picture
from llmrec.evaluation.report import Candidate, Context, Cost, Sample, marks, write_report
from llmrec.evaluation.significance import Difference
from llmrec.evaluation.slices import Slice

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</td></table></html>",
    "{{ 7 * 7 }}{% raw %}",
    "visit http://evil.example/x?a=1&b=2 or HTTPS://evil.example",
    "‮gnihton\x00\x1b[31m\ud800",
    "javascript:alert(1)' onmouseover='alert(1)",
    "data:text/html;base64,PHNjcmlwdD4=",
    "\u2066evil\u2069 \u200ftitle",
    "--></style></svg><svg/onload=alert(1)>",
    "&lt;b&gt; &#60;script&#62;",
]
VOID = {"meta", "wbr"}


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
def context(table):
    weights = Picture("fusion", "Fusion weight", plots.weight_curve([(0.0, 0.05), (0.5, 0.06), (1.0, 0.04)], 0.5))
    known = {"data_fingerprint": "ab", "ambiguous_targets": 7, "users_evaluated": 300, "candidate_set": "top 20", "history_masked": True}
    return Context(
        title="ml-100k: 2mamba4rec + llamarec",
        verdict="Not shown: nothing was.",
        table=table,
        pictures={"training": [weights]},
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
        "61.2",
    ):
        assert wanted in page.text


def test_the_target_is_marked_and_candidates_stand_in_the_retrievers_order(html):
    text = html()
    assert re.findall(r'<tr class="target"><td class="text"><bdi>(.*?)</bdi>', text) == ["Heat"]
    assert text.index(">Alien<") < text.index(">Heat<")


def test_what_is_absent_has_no_heading(html, context, table):
    bare = Page(html(pictures={}))
    for heading in ("The bound", "Where it helps and hurts", "What users liked", "Calibration", "Position bias", "equal scores"):
        assert heading not in bare.text
    difference = Difference(0.0123, -0.004, 0.03, 0.2)
    measures = {
        "preference": {
            "pairwise": {"orpo": {"users": 57, "accuracy": 0.6, "standard_error": 0.07, "ties": 0}},
            "liked": {"users": 31, "threshold": 4.0, "overall": {"orpo": table["overall"]["orpo"]}},
            "comparisons": [table["comparisons"][0] | {"metric": "pairwise", "difference": 0.0777}],
        },
        "ties": {"orpo": {"tied_users": 9, "ndcg@10": [0.3, 0.2], "expected_ndcg@10": 0.25}},
    }
    slices = {"history length": [Slice(3, 12, 150, 0.0456, {"fused": difference})]}
    full = Page(html(measures=measures, slices=slices, latency={"retriever_seconds": 0.002, "ranker_seconds": 1.5})).text
    for wanted in ("What users liked", "the 31 users", "equal scores", "3 – 12", "+0.0123", "0.0456", "PAIRWISE", "+0.0777"):
        assert wanted in full
    assert "2.0 ms + 1.5 s" in full


def test_marks_say_what_the_corrected_test_says(html, context, table):
    found = marks(table["comparisons"])
    for comparison in table["comparisons"]:
        if comparison["b"] == "retriever":
            expected = None if comparison["p_holm"] >= 0.05 else "▲" if comparison["difference"] > 0 else "▼"
            assert found.get((comparison["a"], comparison["metric"])) == expected
    assert "▲" in found.values()
    worse = [{**comparison, "p_holm": 0.01, "difference": -0.1} for comparison in table["comparisons"]]
    assert set(marks(worse).values()) == {"▼"}
    page = html()
    row = page[page.index('<tr><th scope="row">fused') :]
    assert "▲" in row[: row.index("</tr>")]
    before = [{key: value for key, value in comparison.items() if key not in ("p_holm", "p_permutation")} for comparison in worse]
    assert not {"▲", "▼"} & set(html(table={**table, "comparisons": before}))


def test_nothing_outside_is_asked_for(html):
    text = html()
    page = Page(text)
    assert not re.search(r"https?://|<script|<link|<iframe|<img|url\((?!#)|@import", text, re.IGNORECASE)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href", "xlink:href"))
    assert "https://files.grouplens.org/x.zip" in page.text  # readable all the same


@pytest.mark.parametrize("title", HOSTILE)
def test_hostile_titles_stay_text(html, context, title):
    sample = Sample(title, [title], [replace(context.samples[0].candidates[0], title=title)])
    pictures = {"training": [replace(picture, caption=title, lines=(title,)) for picture in context.pictures["training"]]}
    text = html(samples=[sample], title=title, weights=title, pairs={title: title}, verdict=title, pictures=pictures)
    tame_pictures = {"training": [replace(picture, lines=("name_a",)) for picture in context.pictures["training"]]}
    tame = html(samples=[replace(sample, user="u", history=["t"])], pictures=tame_pictures)
    page = Page(text)
    assert not re.search(r"https?://|<script", text, re.IGNORECASE)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert set(page.tags) == set(Page(tame).tags)
    assert not re.search("[\u202e\u2066\u2069\u200f\x00\x1b]", text)
    visible = "".join(c if c.isprintable() else " " for c in title)
    assert page.text.count(visible) >= 8


def test_a_failed_report_leaves_the_old_one(html, context, tmp_path):
    def broken(ax):
        raise ValueError("nothing to draw")

    before = html()
    with pytest.raises(ValueError, match="nothing to draw"):
        html(pictures={"training": [Picture("gone", "gone", [broken])]})
    assert (tmp_path / "report.html").read_text("utf-8") == before
