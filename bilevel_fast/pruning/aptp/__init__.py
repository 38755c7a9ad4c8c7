"""APTP (arXiv:2406.12042): a router that sends each prompt to one of several pruned experts of a dense UNet."""
