"""Objects of stores (s3://, gs://, az://) and of web servers (https://) wherever a path of a file may stand. Imports no torch."""
