"""llmrec: does an LLM ranker, tuned on preferences, beat a fast state-space retriever on your data?

The pipeline is `prepare -> retrieve -> pairs -> sft -> orpo -> evaluate`; see docs/architecture.md.
"""

__version__ = "0.1.0"
