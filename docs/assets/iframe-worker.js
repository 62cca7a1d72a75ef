// Browsers refuse a worker to a page that is opened from disk. There the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.title = "search";
      this.ready = new Promise((resolve, reject) => {
        this.frame.onload = () => {
          const scope = this.frame.contentWindow;
          scope.postMessage = (data) => setTimeout(() => this.onmessage?.({ data }));
          const script = scope.document.createElement("script");
          script.onload = () => resolve(scope);
          script.onerror = reject;
          script.src = url;
          scope.document.head.append(script);
        };
      });
      this.ready.catch((event) => this.onerror?.(event));
      this.frame.srcdoc = "<!doctype html>";
      document.body.append(this.frame);
    }

    postMessage(data) {
      this.ready.then((scope) => scope.onmessage({ data }), () => {});
    }

    terminate() {
      this.frame.remove();
    }
  };
}
