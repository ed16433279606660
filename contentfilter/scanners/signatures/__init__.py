"""chksignature and chkloadertype: programs in attachments, found by their first bytes."""
