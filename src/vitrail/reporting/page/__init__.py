"""The report page: one HTML file that compares runs, without other files and without a network."""

from vitrail.reporting.page.evaluations import find_evaluations
from vitrail.reporting.page.html import render_page
from vitrail.reporting.page.records import RunRecord, common_folder, find_runs, read_run, signature

__all__ = ["RunRecord", "common_folder", "find_evaluations", "find_runs", "read_run", "render_page", "signature"]
