"""Everything that Likeness refuses or fails at on purpose, as one tree of exceptions.

Knows nothing of HTTP, Ray or models: the ingress reads `code` and `status`, the command line prints the text.

    LikenessError
    ├── RequestRefused
    │   ├── InvalidRequest            invalid_request            422
    │   ├── InvalidImage              invalid_image              422
    │   ├── NoFaceDetected            no_face_detected           422
    │   ├── MultipleFaces             multiple_faces             422
    │   ├── FaceTooSmall              face_too_small             422
    │   ├── UnknownModel              unknown_model              404
    │   ├── UnsupportedCombination    unsupported_combination    422
    │   ├── InvalidLora               invalid_lora               422
    │   ├── LoraIncompatible          lora_incompatible          422
    │   ├── LoraNotFound              lora_not_found             404
    │   ├── CharacterNotFound         character_not_found        404
    │   ├── JobNotFound               job_not_found              404
    │   ├── ArtifactNotFound          artifact_not_found         404
    │   ├── IdempotencyConflict       idempotency_conflict       409
    │   ├── TooLarge                  too_large                  413
    │   ├── UrlNotAllowed             url_not_allowed            422
    │   ├── ModeratedInput            moderated_input            422
    │   ├── ModeratedOutput           moderated_output           422
    │   ├── Unauthenticated           unauthenticated            401
    │   ├── Forbidden                 forbidden                  403
    │   └── LicenseRefused            license_refused            403
    ├── QueueFull                     queue_full                 429
    ├── RateLimited                   rate_limited               429
    ├── QuotaExceeded                 quota_exceeded             429
    ├── Cancelled                     canceled                   499
    ├── ReplicaLost                   replica_lost               503
    ├── ServerUnreachable             server_unreachable         503
    ├── DeploymentFailed              deployment_failed          503
    ├── StoreUnavailable              store_unavailable          503
    ├── WeightsError
    │   ├── FetchFailed               fetch_failed               503
    │   ├── MissingWeights            missing_weights            503
    │   ├── DamagedWeights            damaged_weights            503
    │   ├── UnsafeWeights             unsafe_weights             503
    │   └── CheckpointMismatch        checkpoint_mismatch        503
    ├── ProviderUnavailable           provider_unavailable       503
    ├── NotEnoughMemory               not_enough_memory          503
    ├── TrainingDiverged              training_diverged          500
    └── InvalidCatalog                invalid_catalog            500

A code, once published, never changes its meaning. Codes are spelt as the wire spells them (`license`), texts are British.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class LikenessError(Exception):
    """The root: something is wrong, it has a name, and there is something to do about it.

    message: what is wrong, naming the thing. remedy: what to do; the class's own advice unless the raiser knows better.
    details: plain JSON values for a program to read (boxes of the faces found, names of the keys missing).

    All three are positional in `args`, hence an instance survives pickling: Ray sends errors between processes that way.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    advice: ClassVar[str] = "This is a fault of the server: report it together with the request."
    retryable: ClassVar[bool] = False
    """Whether the same request, sent again unchanged, may succeed by itself. Jobs are tried again where it says so."""

    def __init__(self, message: str, remedy: str | None = None, details: Mapping[str, object] | None = None) -> None:
        super().__init__(message, remedy, details)
        self.message = message
        self.remedy = remedy if remedy is not None else self.advice
        self.details: dict[str, object] = dict(details or {})

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}"


class RequestRefused(LikenessError):
    """The caller asked for something that cannot be done; nothing was run, and asking again unchanged will not help."""

    code = "request_refused"
    status = 422
    advice = "Change the request and send it again."


class InvalidRequest(RequestRefused):
    """A field is unknown, missing, of the wrong type or out of its range."""

    code = "invalid_request"


class InvalidImage(RequestRefused):
    """The bytes are not a picture that can be opened within the limits."""

    code = "invalid_image"
    advice = "Send a PNG, JPEG or WebP picture within the size limits."


class NoFaceDetected(RequestRefused):
    """A picture that must show a person shows no face to the detector."""

    code = "no_face_detected"
    advice = "Send a picture in which the whole face is visible, well lit and turned to the camera."


class MultipleFaces(RequestRefused):
    """A picture shows several faces and the request does not say which one is meant."""

    code = "multiple_faces"
    advice = 'Name one with `face_index`: 0 is the largest face, "largest" says so explicitly.'


class FaceTooSmall(RequestRefused):
    """A face was found, with too few pixels for its identity to be read."""

    code = "face_too_small"
    advice = "Send a picture with a larger face, or crop it closer."


class UnknownModel(RequestRefused):
    """No entry of the catalogue has this id."""

    code = "unknown_model"
    status = 404
    advice = "Use an id that the catalogue lists."


class UnsupportedCombination(RequestRefused):
    """Every part exists, but they do not work together."""

    code = "unsupported_combination"


class InvalidLora(RequestRefused):
    """The bytes are not a LoRA file that can be opened within the limits."""

    code = "invalid_lora"
    advice = "Send a whole safetensors file, as the program that trained the LoRA saved it."


class LoraIncompatible(RequestRefused):
    """A LoRA does not apply, or does not wholly apply, to this base model."""

    code = "lora_incompatible"
    advice = "Use a LoRA that was trained on this base model."


class LoraNotFound(RequestRefused):
    """Whoever asks has no LoRA with this id."""

    code = "lora_not_found"
    status = 404
    advice = "Use an id that `GET /v1/loras` lists, or upload the LoRA."


class CharacterNotFound(RequestRefused):
    """Whoever asks has no character with this id."""

    code = "character_not_found"
    status = 404
    advice = "Use an id that `GET /v1/characters` lists."


class JobNotFound(RequestRefused):
    """Whoever asks has no job with this id."""

    code = "job_not_found"
    status = 404
    advice = "Use an id that `GET /v1/jobs` lists; jobs are forgotten some time after they ended."


class ArtifactNotFound(RequestRefused):
    """Whoever asks has no artifact with this id, or it has expired."""

    code = "artifact_not_found"
    status = 404
    advice = "Use an address that a job's answer holds, and fetch it before it expires."


class IdempotencyConflict(RequestRefused):
    """The key of a request was used before, with another body."""

    code = "idempotency_conflict"
    status = 409
    advice = "Send a new key with a new request; the same key belongs to the same body."


class TooLarge(RequestRefused):
    """The body of a request is larger than the server reads."""

    code = "too_large"
    status = 413
    advice = "Send smaller pictures: JPEG, or fewer pixels."


class UrlNotAllowed(RequestRefused):
    """An address may not be fetched from, or posted to, by this server."""

    code = "url_not_allowed"
    advice = "Send the content itself, or an address that the operator allows."


class ModeratedInput(RequestRefused):
    """What was sent is not let in by the operator's content gate."""

    code = "moderated_input"
    advice = "Send something else; the operator decides what is let in."


class ModeratedOutput(RequestRefused):
    """What was drawn is not let out by the operator's content gate."""

    code = "moderated_output"
    advice = "Change the prompt or the pictures; the operator decides what is let out."


class Unauthenticated(RequestRefused):
    """The request brings no API key, or one that is not valid."""

    code = "unauthenticated"
    status = 401
    advice = (
        "Send the header `Authorization: Bearer <key>`, with a key that `likeness keys create` made. "
        "The command line and the SDK send the one in $LIKENESS_KEY."
    )


class Forbidden(RequestRefused):
    """The API key is valid, and not for this."""

    code = "forbidden"
    status = 403
    advice = "Use a key that has the scope which is named."


class LicenseRefused(RequestRefused):
    """The licence of some weights does not allow the use that this installation is for."""

    code = "license_refused"
    status = 403
    advice = "Use a model whose licence allows commercial use, or lift LICENSE_POLICY where the licence is met."


class QueueFull(LikenessError):
    """The server is sound, but as many requests wait as may wait."""

    code = "queue_full"
    status = 429
    advice = "Send the request again later."
    retryable = True


class RateLimited(LikenessError):
    """More requests came with this API key than it may send in the time."""

    code = "rate_limited"
    status = 429
    advice = "Send the request again after the seconds that the header Retry-After names."
    retryable = True


class QuotaExceeded(LikenessError):
    """As many requests or jobs of this API key are under way or waiting as may be."""

    code = "quota_exceeded"
    status = 429
    advice = "Wait until some of yours have ended, or cancel them."
    retryable = True


class Cancelled(LikenessError):
    """Whoever asked has cancelled or gone, and the work was stopped before its end."""

    code = "canceled"
    # nginx's number for a client that closed the request; nobody is left to read it, logs and metrics are.
    status = 499
    advice = "Send the request again if the picture is wanted after all."


class ReplicaLost(LikenessError):
    """The process that worked on the request died; another takes its place."""

    code = "replica_lost"
    status = 503
    advice = "Send the request again."
    retryable = True


class ServerUnreachable(LikenessError):
    """The client could not speak with the server: nobody answers at the address, or the answer is not Likeness's."""

    code = "server_unreachable"
    status = 503
    advice = "Check the address, and that the server is running (`likeness serve`)."
    retryable = True


class DeploymentFailed(LikenessError):
    """A part of the server could not be started."""

    code = "deployment_failed"
    status = 503
    advice = "Correct what is named, and start the server again."


class StoreUnavailable(LikenessError):
    """The database or the folder in which the server keeps things cannot be used; the operator has to act."""

    code = "store_unavailable"
    status = 503
    advice = "Check that the database answers, that this server is not older than what it holds, and that the disk is not full."
    retryable = True


class WeightsError(LikenessError):
    """The files of a model cannot be used as they are; the operator, not the caller, has to act."""

    code = "weights_error"
    status = 503


class FetchFailed(WeightsError):
    """A file of weights could not be fetched from where it is published."""

    code = "fetch_failed"
    advice = "Check the network and run the command again: it goes on where it stopped."


class MissingWeights(WeightsError):
    """A file of weights is not on this machine."""

    code = "missing_weights"


class DamagedWeights(WeightsError):
    """A file of weights is not the file that the catalogue pins, or cannot be read."""

    code = "damaged_weights"
    advice = "Delete the file and fetch it again."


class UnsafeWeights(WeightsError):
    """A file of weights is a pickle, or of a kind that is not known to be harmless: opening it could run code."""

    code = "unsafe_weights"
    advice = "Use the safetensors or ONNX form of these weights."


class CheckpointMismatch(WeightsError):
    """The tensors of a file are not those of the model: names are missing or left over, or shapes differ."""

    code = "checkpoint_mismatch"
    advice = "Use the checkpoint that was made for this model and this configuration of it."


class ProviderUnavailable(LikenessError):
    """The hardware or library that a setting asks the models to run on does not run them here."""

    code = "provider_unavailable"
    status = 503
    advice = "Install what the provider needs (for cuda: the extra `gpu`, a driver and a visible GPU), or set the provider to cpu."


class NotEnoughMemory(LikenessError):
    """What is to be trained does not fit into the memory that there is; found out before anything is loaded."""

    code = "not_enough_memory"
    status = 503
    advice = "Train on a larger GPU, or with fewer pictures at once."


class TrainingDiverged(LikenessError):
    """The loss is no number any more; what was learned since the last checkpoint is lost."""

    code = "training_diverged"
    advice = "Train again with a lower learning rate, or with warm-up steps."


class InvalidCatalog(LikenessError):
    """The catalogue, or a file it refers to, says something that cannot be meant."""

    code = "invalid_catalog"
    advice = "Correct the file that is named."


def unwrapped(error: BaseException) -> BaseException:
    """What Ray carried from one process to another, without its wrapping, which may lie around it several times. (The wrapping of an error
    of ours is a subclass of it, without its docstring.)"""
    while isinstance(cause := getattr(error, "cause", None), BaseException) and cause is not error:
        error = cause
    return error
