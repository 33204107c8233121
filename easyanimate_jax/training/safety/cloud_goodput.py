"""Sections of a run for Google Cloud's goodput measurement; `goodput.jsonl` needs none of it.

The package ml-goodput-measurement (extra `cloud`) keeps the starts of a job's steps in Cloud
Logging and makes of them the goodput and badput of Google's dashboards. It knows a restart by a
step that starts again.
"""

# Inside the loop these stop the steps, so they are events of their own, named as in goodput.jsonl.
EVENTS = ("restore", "compile", "save", "sample")


def open_sink(job: str, *, process: int) -> "CloudGoodput | None":
    """The sink of the job of that name in process 0, and None where there is nothing to tell.

    Raises ValueError without the package, or if Google Cloud does not let us in.
    """
    if not job or process:
        return None
    try:
        from ml_goodput_measurement import goodput
    except ImportError as error:
        raise ValueError(
            f"goodput_job is {job!r}, and ml-goodput-measurement is not there ({error}); "
            f"pip install 'easyanimate_jax[cloud]', or leave goodput_job empty"
        ) from error
    from google.auth.exceptions import GoogleAuthError

    try:
        return CloudGoodput(goodput.GoodputRecorder(job, f"goodput_{job}", logging_enabled=True))
    except (GoogleAuthError, OSError) as error:
        raise ValueError(
            f"goodput_job is {job!r}, and Google Cloud does not let us in: {error}; "
            f"run `gcloud auth application-default login`, or leave goodput_job empty"
        ) from error


class CloudGoodput:
    """Tells a `GoodputRecorder` of each section that `Monitor` enters.

    All before the first wait for data is preparation. A step's time is what lies between its start
    and the next one's, without the events; the recorder's own threads send what is told.
    """

    def __init__(self, recorder):
        self.recorder = recorder
        self.leave = recorder.record_training_preparation_end_time  # what ends the present section
        self.prepared = False
        recorder.record_job_start_time()
        recorder.record_training_preparation_start_time()

    def enter(self, section: str, step: int | None) -> None:
        """`step` is given at the start of a step and of the wait for its data."""
        recorder = self.recorder
        if section == "data":
            self._left(recorder.record_data_loading_end_time)
            self.prepared = True
            recorder.record_data_loading_start_time()
        elif not self.prepared:
            return
        elif section in ("step", "rework") or (section == "compile" and step is not None):
            self._left(None)
            recorder.record_step_start_time(step)
        elif section in EVENTS:
            self._left(
                lambda: recorder.record_custom_badput_event_end_time(
                    custom_badput_event_type=section
                )
            )
            recorder.record_custom_badput_event_start_time(custom_badput_event_type=section)
        else:
            self._left(None)

    def close(self) -> None:
        self._left(None)
        self.recorder.record_job_end_time()
        self.recorder.flush()

    def _left(self, leave) -> None:
        """The present section has ended; `leave` will end the one that begins."""
        if self.leave:
            self.leave()
        self.leave = leave
