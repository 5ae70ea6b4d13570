"""The error for a record that is not a document."""

from __future__ import annotations


class BadDocumentError(Exception):
    """Why a record is not a document; becomes Rejected.reason."""
