// llama.cpp as a peer: reads questions from standard input, one JSON object a line, and answers each with one line.
//
//     node llama_cpp.mjs MODEL.gguf THREADS
//
// {"decode": [tokens], "count": n}  ->  {"tokens": [...], "seconds": s, "cpu": s}   greedy; the prompt is not timed
// {"score": [tokens]}               ->  {"losses": [...]}   nats of every token after the first
import path from "node:path";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const [file, threads] = process.argv.slice(2);
const home = path.resolve(process.env.EFFNB_NPM ?? "build/npm", "node_modules/node-llama-cpp/dist/index.js");
const {getLlama} = await import(pathToFileURL(home).href);
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error", maxThreads: +threads});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 1024, batchSize: 512, sequences: 1, threads: {ideal: +threads, min: +threads}});
const sequence = context.getSequence();

async function decode(prompt, count) {
  await sequence.clearHistory();
  const tokens = [];
  let start, cpu;
  // The first token comes with the prompt: the clock runs from there on, over `count` more.
  for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    if (start === undefined) {
      cpu = process.cpuUsage();
      start = process.hrtime.bigint();
    }
    tokens.push(token);
    if (tokens.length > count) break;
  }
  const seconds = Number(process.hrtime.bigint() - start) / 1e9;
  const used = process.cpuUsage(cpu);
  return {tokens, seconds, cpu: (used.user + used.system) / 1e6, threads: context.currentThreads};
}

async function score(tokens) {
  await sequence.clearHistory();
  const asked = tokens.slice(0, -1).map((token) => [token, {generateNext: {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}}}]);
  const answers = await sequence.controlledEvaluate(asked);
  return {losses: answers.map((answer, i) => -Math.log(answer.next.probabilities.get(tokens[i + 1])))};
}

console.log(JSON.stringify({ready: true, threads: context.currentThreads}));
for await (const line of createInterface({input: process.stdin})) {
  const question = JSON.parse(line);
  const answer = question.decode ? await decode(question.decode, question.count) : await score(question.score);
  console.log(JSON.stringify(answer));
}
process.exit(0);
