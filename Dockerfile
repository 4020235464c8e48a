# The README's steps on a CPU machine. Build: docker build -t tinyllava .
# Run: docker run --shm-size 2g -v tinyllava:/root/.cache/tinyllava tinyllava starter --short
FROM python:3.12-slim
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1
WORKDIR /tinyllava
COPY . .
RUN python3 -m venv .venv
ENV PATH=/tinyllava/.venv/bin:$PATH
RUN pip install --constraint constraints.txt '.[report,serve]'
ENTRYPOINT ["tinyllava"]
CMD ["--help"]
