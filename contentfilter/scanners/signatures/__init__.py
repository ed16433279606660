"""Signature scanner (chksignature and chkloadertype): programs in attachments, detected by their first bytes."""
