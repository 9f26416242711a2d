"""Answers on disk and what is made of them: predictions, scores, intervals, comparisons, pages."""
