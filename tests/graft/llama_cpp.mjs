// Next-token logits by llama.cpp: node llama_cpp.mjs PACKAGES JOB.json ANSWERS.json, where JOB holds a base, token
// ids, and the adapters to put on it, one after the other (null: none). ANSWERS is a list of logits for each.
// (Its probabilities are divided by a sum in float32, which is off by 1e-4 for a vocabulary of 49,152.)
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const [packages, job, answers] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(`${packages}/node_modules/node-llama-cpp/dist/index.js`).href);
const {base, tokens, adapters} = JSON.parse(readFileSync(job, "utf8"));

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath: base, gpuLayers: 0});
const found = [];
for (const adapter of adapters) {
    const context = await model.createContext({
        contextSize: 64, flashAttention: false, threads: 1,
        // As exact as the live model: keys and values in full precision, too.
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
        lora: adapter === null ? undefined : {adapters: [{filePath: adapter}]}
    });
    const input = tokens.map((token, i) => i + 1 < tokens.length ? token : [token, {generateNext: {logits: true}}]);
    const results = await context.getSequence().controlledEvaluate(input);
    const {logits} = results[tokens.length - 1].next;
    found.push([...logits.entries()].sort((a, b) => a[0] - b[0]).map(([, x]) => x));
    await context.dispose();
}
writeFileSync(answers, JSON.stringify(found));
process.exit(0);
