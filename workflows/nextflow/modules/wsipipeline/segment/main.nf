process WSIPIPELINE_SEGMENT {
    tag "$meta.id"
    label 'process_high'

    conda "${moduleDir}/environment.yml"
    container "${params.wsi_pipeline_container ?: 'wsi-pipeline:latest'}"

    input:
    tuple val(meta), path(slide)
    path model

    output:
    tuple val(meta), path("${prefix}/mask.ome.zarr")       , emit: mask
    tuple val(meta), path("${prefix}/mask.ome.tif")        , emit: tiff       , optional: true
    tuple val(meta), path("${prefix}/annotations.geojson") , emit: annotations, optional: true
    tuple val(meta), path("${prefix}/regions.csv")         , emit: regions    , optional: true
    tuple val(meta), path("${prefix}/probability.ome.zarr"), emit: probability, optional: true
    tuple val(meta), path("${prefix}/overlay.png")         , emit: overlay    , optional: true
    tuple val(meta), path("${prefix}/run.json")            , emit: run
    path "versions.yml"                                    , emit: versions

    when:
    task.ext.when == null || task.ext.when

    script:
    def args = task.ext.args ?: ''
    prefix = task.ext.prefix ?: "${meta.id}"
    """
    wsi-pipeline -q segment \\
        "$slide" \\
        --model "$model" \\
        --output segmented \\
        --threads $task.cpus \\
        --max-ram ${task.memory ? task.memory.toGiga() : 8}GB \\
        $args
    mv segmented/*/ "$prefix"

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        wsi-pipeline: \$(wsi-pipeline --version | sed 's/.* //')
    END_VERSIONS
    """

    stub:
    prefix = task.ext.prefix ?: "${meta.id}"
    """
    mkdir -p "$prefix/mask.ome.zarr"
    touch "$prefix/run.json"

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        wsi-pipeline: \$(wsi-pipeline --version | sed 's/.* //')
    END_VERSIONS
    """
}
