"""The references stay what they were: their weights are compared before every step."""

from dataclasses import dataclass

from kleash.errors import ReferenceChangedError
from kleash.models.policy import Identity
from kleash.models.reference_offload import FrozenReference


@dataclass(frozen=True, eq=False)
class SealedReference:
    """A reference and the weights it had, as a hash and as a sum that is cheap to compare."""

    reference: FrozenReference
    identity: Identity
    checksum: int

    @classmethod
    def of(cls, reference: FrozenReference) -> "SealedReference":
        """Record which weights a reference has."""
        return cls(reference, reference.identity(), reference.fingerprint())

    def require_checksum(self) -> None:
        """Cheap, before every step.

        Raises:
            ReferenceChangedError: the sum of the weights is another.
        """
        if self.reference.fingerprint() != self.checksum:
            raise self._changed()

    def require_hash(self) -> None:
        """Every bit, before a checkpoint.

        Raises:
            ReferenceChangedError: a weight is another.
        """
        if self.reference.identity() != self.identity:
            raise self._changed()

    def _changed(self) -> ReferenceChangedError:
        return ReferenceChangedError(
            f"the reference changed while training: its weights were {self.identity.sha256[:12]}…, "
            f"got {self.reference.identity().sha256[:12]}…; find what writes into them (a shared "
            "parameter, a reward function) and resume"
        )


@dataclass(frozen=True, eq=False)
class ReferenceGuard:
    """Watches the original reference and, once the run has re-anchored, the anchor too."""

    sealed: tuple[SealedReference, ...]

    @classmethod
    def of(cls, original: FrozenReference, anchor: FrozenReference) -> "ReferenceGuard":
        """Record which weights both have; they may be one model."""
        distinct = (original,) if anchor is original else (original, anchor)
        return cls(tuple(SealedReference.of(reference) for reference in distinct))

    @property
    def original(self) -> Identity:
        """The identity of the reference that the run began with."""
        return self.sealed[0].identity

    def require_checksums(self) -> None:
        """See `SealedReference.require_checksum`."""
        for reference in self.sealed:
            reference.require_checksum()

    def require_hashes(self) -> None:
        """See `SealedReference.require_hash`."""
        for reference in self.sealed:
            reference.require_hash()
