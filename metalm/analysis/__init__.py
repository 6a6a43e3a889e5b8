"""Scores by method, article and position, with intervals, tables, plots and a report.

Plain arrays in, tables and pictures out: this room knows no models.
"""

from metalm.analysis.report import write_page as write_page
from metalm.analysis.report import write_report as write_report
from metalm.analysis.statistics.scores import ArticleScores as ArticleScores
from metalm.analysis.statistics.scores import Scores as Scores
from metalm.analysis.statistics.traces import Trace as Trace
