#!/usr/bin/env nextflow
// nextflow run workflows/nextflow --slides 'slides/*.svs' --model models/lightmuseg-bcss-demo --outdir out
include { WSIPIPELINE_SEGMENT } from './modules/wsipipeline/segment/main'

workflow {
    slides = Channel.fromPath(params.slides, checkIfExists: true).map { [[id: it.baseName], it] }
    WSIPIPELINE_SEGMENT(slides, file(params.model, checkIfExists: true))
}
