"""The glossary as a page: `docs/metrics.md`."""

from kleash.report.glossary import GLOSSARY


def markdown() -> str:
    """The table as the text of `docs/metrics.md`."""
    head = """# What every number means

This page is written by `python -m kleash.report.glossary_page > docs/metrics.md`; a test holds it
equal to the table in `src/kleash/report/glossary.py`, which the report shows too.

Nats throughout. A KL is positive when the policy has drifted. Per response unless the key or the
unit says per token. In a formula y runs over responses, t over tokens and u over the updates of a
step. There are three KLs and never a bare `kl`: to the **reference**
(`objective/kl_ref`), of the **update** (`policy/approx_kl`), and of the **sampler**
(`rollout/kl_sampler`). "Healthy" is where to look twice, not a law.

| key | what it is | formula | unit | healthy |
|---|---|---|---|---|
"""
    rows = [
        f"| `{metric.key}` | **{metric.title}.** {metric.meaning} | {_cell(metric.formula)} "
        f"| {metric.unit} | {metric.healthy} |"
        for metric in GLOSSARY
    ]
    return head + "\n".join(rows) + "\n"


def _cell(formula: str) -> str:
    # A bar would end the cell of a Markdown table.
    return f"`{formula}`".replace("|", "\\|") if len(formula) > 1 else formula


if __name__ == "__main__":
    print(markdown(), end="")
