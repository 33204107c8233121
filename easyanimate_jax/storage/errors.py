"""Tell errors that damaged files cause from errors that say nothing about the files.

A sound file does not read while the limit of open files is reached, memory is short, a mount is
gone, or another process of the run has died. Such a file must not be taken for a damaged one.
"""

import errno

OF_THE_SYSTEM = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EACCES),
    *(errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
}
# tensorstore raises ValueError with the status first; JAX's own error is of a device or a process.
STATUS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "ABORTED")
STATUS += ("DEADLINE_EXCEEDED",)
# How the text of such an error begins where JAX copies an array to the host: a ValueError, too.
OF_RUNTIME = ("UNKNOWN: ", "INTERNAL: ", "CANCELLED: ")


class AnotherRunError(ValueError):
    """Another run works in the same folder, and this one must not go on."""


def is_of_the_system(error: BaseException | None) -> bool:
    """Return True if an error, or one that caused it, says nothing about the files."""
    while error is not None:
        if isinstance(error, MemoryError) or is_of_jax(error):
            return True
        if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
            return True
        if str(error).startswith(STATUS):
            return True
        error = error.__cause__ or error.__context__
    return False


def raise_if_of_the_system(error: BaseException) -> None:
    """Raise an OSError that says nothing about the files: their disk or their store fails."""
    if isinstance(error, OSError) and is_of_the_system(error):
        raise error


def of_store(error: Exception, name: str) -> OSError:
    """Return an error of obstore as an OSError that names the object."""
    from obstore import exceptions as known

    ask = "see `gcloud auth application-default login`, `aws configure`, the rights of the account"
    kinds = [
        (known.NotFoundError, errno.ENOENT, "there is no such object"),
        (known.AlreadyExistsError, errno.EEXIST, "the object exists"),
        (known.PermissionDeniedError, errno.EACCES, f"the store refuses these credentials; {ask}"),
        (known.UnauthenticatedError, errno.EACCES, f"the store wants credentials; {ask}"),
        (known.BaseError, errno.ETIMEDOUT, "the store did not answer; run the same command again"),
    ]
    kind = known.NotFoundError if isinstance(error, FileNotFoundError) else type(error)
    if "169.254.169.254" in str(error):  # where clients ask a machine of a cloud for credentials
        kind = known.UnauthenticatedError
    code, text = next((code, text) for one, code, text in kinds if issubclass(kind, one))
    if code in (errno.EACCES, errno.ETIMEDOUT):
        text += f" ({' '.join(str(error).splitlines()[0].split())[:300]})"
    return OSError(code, text, name)


def is_of_jax(error: BaseException | None) -> bool:
    """Return True if the cause is a device without memory, or a process of the run that is gone."""
    while error is not None and type(error).__name__ != "JaxRuntimeError":
        if says_jax(error):
            return True
        error = error.__cause__ or error.__context__
    return error is not None


def says_jax(error: BaseException) -> bool:
    """Return True for a ValueError with the text of JAX's runtime: no wrong input."""
    return isinstance(error, ValueError) and str(error).startswith(OF_RUNTIME)
