"""What several test files share, beside the fixtures of conftest.py; no test file imports another.

- `vits`: timm's ViT in many variants.
- `budgets`: ALaST that says what a test means, whatever its defaults are.
- `resuming`: runs that are cut off like a process that is killed.
- `whole_runs`: what every source of pictures must stand.
- `run_folders`: run folders for exports, and what their models compute.
- `ranks`: two processes that train together.
- `halves`: a cut model in one process.
- `clients`: a client half whose frames the test carries, and the sessions that it talks to.
- `servers`: a server in a thread, and clients that send it whatever they like.
- `processes`: `snello` in processes of their own, which can be killed, limited and led astray.
- `certificates`: certificates, and a gRPC server that asks for them.
- `browser`: a real Chromium, and what it finds wrong with a page.
"""
