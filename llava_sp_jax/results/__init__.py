"""Results on disk and their presentation: predictions, scores, intervals, comparisons, pages."""
