"""Scoring of answers: rules, rows, measures, statistics and summaries."""
