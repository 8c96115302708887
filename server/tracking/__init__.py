"""Runs told to people's trackers as they happen: MLflow, TensorBoard, Weights & Biases.

Guarantees (tests: tests/server/tracking/)
    * What is sent is the job's settings, metrics on public records and the largest epsilon by round, as the run recorded
      them, and at the end the report without the names of sites; the adapter only where it is asked for. Of a site nothing
      else: no metric, text or name.
    * Figures that no epsilon covers stay here: those of private evaluation records, and of trainings without noise on
      private records. Under central DP nothing is sent, for the times of rounds tell how many sites were drawn.
    * A tracker that refuses, hangs or dies neither ends a run nor holds it up: a thread of its own sends, one warning says
      so, and the end says what did not arrive.
"""

from server.tracking.target import Target, read_targets
from server.tracking.tracking import Told, Tracking
from server.tracking.watched import Watched

__all__ = ["Target", "Told", "Tracking", "Watched", "read_targets"]
