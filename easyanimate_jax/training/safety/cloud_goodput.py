"""Report the sections of a run to Google Cloud's goodput measurement.

The package ml-goodput-measurement (extra `cloud`) writes the start times of a job's steps to Cloud
Logging; Google's dashboards compute goodput and badput from them. The package detects a restart by
a step that starts again. `goodput.jsonl` is independent of this module.
"""

# These sections interrupt the steps, so they are separate events, named as in goodput.jsonl.
EVENTS = ("restore", "compile", "save", "sample", "validate", "reward", "profile")


def open_sink(job: str, *, process: int) -> "CloudGoodput | None":
    """Return the sink of a job in process 0; None in other processes and for an empty name.

    Raises ValueError if the package is not installed or Google Cloud refuses access.
    """
    if not job or process:
        return None
    try:
        from ml_goodput_measurement import goodput
    except ImportError as error:
        raise ValueError(
            f"goodput_job is {job!r}, and ml-goodput-measurement is not installed ({error}); "
            f"pip install 'easyanimate_jax[cloud]', or leave goodput_job empty"
        ) from error
    from google.auth.exceptions import GoogleAuthError

    try:
        return CloudGoodput(goodput.GoodputRecorder(job, f"goodput_{job}", logging_enabled=True))
    except (GoogleAuthError, OSError) as error:
        raise ValueError(
            f"goodput_job is {job!r}, and Google Cloud refuses access: {error}; "
            f"run `gcloud auth application-default login`, or leave goodput_job empty"
        ) from error


class CloudGoodput:
    """Reports each section that `Monitor` enters to a `GoodputRecorder`.

    The time before the first wait for data is preparation. The time of a step is that from its
    start to the start of the next step, without events. The recorder sends from its own threads.
    """

    def __init__(self, recorder):
        self.recorder = recorder
        self.leave = recorder.record_training_preparation_end_time  # ends the current section
        self.prepared = False
        recorder.record_job_start_time()
        recorder.record_training_preparation_start_time()

    def enter(self, section: str, step: int | None) -> None:
        """Report the start of a section; `step` is the step that it belongs to, if any."""
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
        """Report the end of the job and send all records."""
        self._left(None)
        self.recorder.record_job_end_time()
        self.recorder.flush()

    def _left(self, leave) -> None:
        """End the current section; store `leave`, which ends the next one."""
        if self.leave:
            self.leave()
        self.leave = leave
