"""The wire: stubs, lazy requests and answers, the tensor codec, statuses and reports. No transport, no loop."""
